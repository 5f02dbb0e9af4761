"""A first agent with one tool, written as for the Agents SDK alone. Copy the folder, or run `gateway new NAME`."""

from agents import Agent, function_tool

GREETINGS = {"berlin": "Guten Tag", "madrid": "Hola", "paris": "Bonjour", "tokyo": "Konnichiwa"}


@function_tool
def say_hello(city: str) -> str:
    """Say hello the way people in a city do."""
    return f"{GREETINGS.get(city.lower(), 'Hello')} from {city}!"


agent = Agent(
    name="Hello",
    instructions="You greet people. Use say_hello to find the greeting of the city they name.",
    tools=[say_hello],
)

__gateway__ = {"description": "Says hello the way people in a city do."}
