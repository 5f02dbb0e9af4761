"""A first agent with one tool, written as for the Agents SDK alone. Copy the folder, or run `gateway new NAME`."""

from agents import Agent, function_tool

GREETINGS = {"berlin": "Guten Tag", "madrid": "Hola", "paris": "Bonjour", "tokyo": "Konnichiwa"}


@function_tool
def find_greeting(city: str) -> str:
    """Find the greeting that people in a city use."""
    return f"{GREETINGS.get(city.lower(), 'Hello')} from {city}!"


agent = Agent(
    name="Hello",
    instructions="You greet people. Use find_greeting for the city they name.",
    tools=[find_greeting],
)

__gateway__ = {"description": "Greets the way people in a city do."}
