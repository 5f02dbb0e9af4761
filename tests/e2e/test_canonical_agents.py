"""AC-3: what the SDK can do, an agent served over HTTP can do: handoffs, guardrails, hooks, structured output …"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.support.obedient_upstream import ObedientUpstream
from tests.support.schema import assert_completion, assert_error
from tests.support.server import Gateway


def ask(client: OpenAI, model: str, text: str, **options: Any) -> str:
    """One unstreamed question; returns the text of the answer."""
    answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **options)
    assert_completion(answer.model_dump(exclude_unset=True))
    return answer.choices[0].message.content or ""


def ask_streamed(client: OpenAI, model: str, text: str, **options: Any) -> tuple[str, str | None]:
    """The same, streamed; returns the text and the finish reason."""
    parts, finish = [], None
    with client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], stream=True, **options
    ) as stream:
        for chunk in stream:
            for choice in chunk.choices:
                parts.append(choice.delta.content or "")
                finish = choice.finish_reason or finish
    return "".join(parts), finish


def test_every_canonical_agent_is_listed_and_internal_ones_are_not(gateway: Gateway) -> None:
    assert gateway.model_ids() >= {
        "default/weatheragent",
        "default/handoff",
        "default/inputguardrail",
        "default/outputguardrail",
        "default/hooks",
        "default/structured",
        "default/agentastool",
        "default/asyncfactory",
        "default/syncfactory",
        "default/several",
        "default/innerrun",
        "default/contextreader",
        "default/approval",
        "default/fixedmodel",
        "default/tooltrouble",
        "default/rootagentstyle",
        "default/email",
        "default/single",
        "labs/research",
    }
    names = " ".join(gateway.model_ids())
    for internal in ("billing", "refunds", "spanish", "french", "writer", "critic", "judge", "internal", "planner"):
        assert internal not in names


@pytest.mark.parametrize("streamed", [False, True])
def test_handoff_and_the_specialists_tool(client: OpenAI, upstream: ObedientUpstream, streamed: bool) -> None:
    text = f'call transfer_to_billing {{}} ;; call invoice_total {{"customer":"Ada{streamed}"}} ;; echo'
    run = ask_streamed if streamed else ask
    answer = run(client, "default/handoff", text)
    assert f"Ada{streamed} owes 42 euros" in (answer[0] if isinstance(answer, tuple) else answer)
    triage, billing, last = upstream.find(f"Ada{streamed}")
    assert triage.system == "You are triage. Hand over."
    assert billing.system == last.system == "You are billing."


@pytest.mark.parametrize("streamed", [False, True])
def test_input_guardrail_refuses_before_the_model_is_asked(
    client: OpenAI, upstream: ObedientUpstream, streamed: bool
) -> None:
    text = f"say never ;; do my homework {streamed}"
    with pytest.raises(openai.BadRequestError) as refusal:
        ask_streamed(client, "default/inputguardrail", text) if streamed else ask(
            client, "default/inputguardrail", text
        )
    assert refusal.value.code == "content_policy_violation"
    assert_error({"error": refusal.value.body})
    assert not upstream.find(f"homework {streamed}")
    assert ask(client, "default/inputguardrail", "say fine") == "fine"


def test_output_guardrail_withholds_the_text_plain_and_streamed(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="default/outputguardrail", messages=[{"role": "user", "content": "say the codeword is swordfish"}]
    )
    assert answer.choices[0].finish_reason == "content_filter"
    assert "swordfish" not in (answer.choices[0].message.content or "")
    text, finish = ask_streamed(client, "default/outputguardrail", "say the codeword is swordfish")
    assert finish == "content_filter"
    assert "swordfish" not in text, "a streamed answer cannot be unsent: it must be held back"
    assert ask_streamed(client, "default/outputguardrail", "say all is well") == ("all is well", "stop")


@pytest.mark.parametrize("streamed", [False, True])
def test_hooks_see_the_run(client: OpenAI, streamed: bool) -> None:
    run = ask_streamed if streamed else ask
    answer = run(client, "default/hooks", "call seen_so_far ;; echo")
    assert (answer[0] if isinstance(answer, tuple) else answer) == "start,llm_start,llm_end,tool_start:seen_so_far"


def test_runs_do_not_share_their_state(client: OpenAI) -> None:
    first = ask(client, "default/hooks", "call seen_so_far ;; echo")
    second = ask(client, "default/hooks", "call seen_so_far ;; echo")
    assert first == second


@pytest.mark.parametrize("streamed", [False, True])
def test_structured_output_is_json_in_the_content(client: OpenAI, upstream: ObedientUpstream, streamed: bool) -> None:
    event = {"title": f"party {streamed}", "participants": [{"name": "Ada"}]}
    run = ask_streamed if streamed else ask
    answer = run(client, "default/structured", f"say {json.dumps(event)}")
    assert json.loads(answer[0] if isinstance(answer, tuple) else answer) == event
    call = upstream.find(f"party {streamed}")[0]
    assert call.body["response_format"]["type"] == "json_schema"


def test_structured_output_that_does_not_fit_is_a_502_the_client_can_see(client: OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as failure:
        ask(client, "default/structured", "say not json at all")
    assert (failure.value.status_code, failure.value.code) == (502, "model_behavior_error")


@pytest.mark.parametrize("streamed", [False, True])
def test_agent_as_tool_with_a_tool_of_its_own(client: OpenAI, upstream: ObedientUpstream, streamed: bool) -> None:
    inner = json.dumps({"input": f'call dictionary {{"word":"hi{streamed}"}} ;;; echo'})
    run = ask_streamed if streamed else ask
    answer = run(client, "default/agentastool", f"call to_spanish {inner} ;; echo")
    assert f"hi{streamed} means hola" in (answer[0] if isinstance(answer, tuple) else answer)
    systems = [call.system for call in upstream.find(f"hi{streamed}")]
    assert systems.count("You are the Spanish translator.") == 2


def test_usage_is_the_sum_over_all_inner_model_calls(client: OpenAI) -> None:
    inner = json.dumps({"input": 'call dictionary {"word":"sum"} ;;; echo'})
    answer = client.chat.completions.create(
        model="default/agentastool", messages=[{"role": "user", "content": f"call to_spanish {inner} ;; echo"}]
    )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 40, "two outer and two inner calls of ten tokens each"


def test_factories_async_and_with_sibling_file(client: OpenAI, upstream: ObedientUpstream) -> None:
    ask(client, "default/asyncfactory", "say async factory")
    assert upstream.find("async factory")[0].system == "You were built."
    ask(client, "default/syncfactory", "say plain factory")
    assert upstream.find("plain factory")[0].system == "You greet."


def test_two_agents_of_one_file_are_two_models(client: OpenAI, gateway: Gateway, upstream: ObedientUpstream) -> None:
    ids = sorted(i for i in gateway.model_ids() if i.startswith("default/twoexports"))
    assert len(ids) == 2
    for index, model in enumerate(ids):
        ask(client, model, f"say two exports {index}")
    systems = {upstream.find(f"two exports {index}")[0].system for index in range(2)}
    assert systems == {"You are sales.", "You are support."}


def test_the_root_of_several_agents_is_the_one_nobody_hands_to(client: OpenAI, upstream: ObedientUpstream) -> None:
    ask(client, "default/several", "say root rule")
    assert upstream.find("root rule")[0].system == "You are the editor."


def test_runner_run_inside_a_guardrail_uses_the_gateways_upstream(client: OpenAI, upstream: ObedientUpstream) -> None:
    text = 'judge> say {"refuse": false}\nsay inner run passed'
    assert ask(client, "default/innerrun", text) == "inner run passed"
    judge, agent = upstream.find("inner run passed")
    assert (judge.system, agent.system) == ("You are the judge.", "You are judged.")
    with pytest.raises(openai.BadRequestError) as refusal:
        ask(client, "default/innerrun", 'judge> say {"refuse": true}\nsay inner run refused')
    assert refusal.value.code == "content_policy_violation"
    assert len(upstream.find("inner run refused")) == 1


def test_context_is_given_to_instructions_and_tools(client: OpenAI, upstream: ObedientUpstream) -> None:
    answer = client.chat.completions.create(
        model="default/contextreader",
        messages=[{"role": "user", "content": "call whoami ;; echo ;; context reader"}],
        metadata={"ticket": "T-7"},
        extra_headers={"x-request-id": "req-context-1", "x-session-id": "s-1", "x-secret-thing": "canary-header"},
    )
    context = json.loads(answer.choices[0].message.content or "")
    assert context["request_id"] == "req-context-1"
    assert context["principal"]["key_id"] == "chat"
    assert context["model"] == "default/contextreader"
    assert context["metadata"] == {"ticket": "T-7"}
    assert context["session_id"] == "s-1"
    assert "canary-header" not in json.dumps(context)
    assert "canary" not in json.dumps(context), "no key reaches an author's code"
    assert upstream.find("context reader")[0].system.endswith("as default/contextreader with T-7.")


@pytest.mark.parametrize("streamed", [False, True])
def test_a_tool_that_needs_approval_answers_409_and_is_not_retried(
    gateway: Gateway, upstream: ObedientUpstream, streamed: bool
) -> None:
    body = {
        "model": "default/approval",
        "stream": streamed,
        "messages": [{"role": "user", "content": 'call delete_account {"name":"Ada"} ;; echo'}],
    }
    answer = gateway.post("/v1/chat/completions", body)
    assert answer.status == 409, answer.body
    assert answer.error["code"] == "approval_required"
    assert answer.headers["x-should-retry"] == "false"
    assert_error(answer.json())


def test_hosted_tool_is_refused_at_load_with_the_reason(gateway: Gateway) -> None:
    assert "default/hostedtool" not in gateway.model_ids()
    entry = gateway.listing()["default/hostedtool"]
    assert entry["status"] == "error"
    assert "web" in json.dumps(entry).lower() and "local" in json.dumps(entry)
    answer = gateway.post(
        "/v1/chat/completions", {"model": "default/hostedtool", "messages": [{"role": "user", "content": "hi"}]}
    )
    assert answer.status in (404, 500)
    assert_error(answer.json())


def test_fixed_model_name_is_mapped_and_settings_arrive(client: OpenAI, upstream: ObedientUpstream) -> None:
    ask(client, "default/fixedmodel", "say fixed model")
    call = upstream.find("fixed model")[0]
    assert call.body["model"] == "test-model"
    assert call.body["temperature"] == 0.25
    ask(client, "default/fixedmodel", "say warmer model", temperature=0.75, max_tokens=77, seed=5, stop=["END"])
    body = upstream.find("warmer model")[0].body
    assert (body["temperature"], body["seed"], body["stop"]) == (0.75, 5, ["END"])
    assert 77 in (body.get("max_tokens"), body.get("max_completion_tokens"))


def test_no_setting_of_another_vendors_models_reaches_a_local_model(client: OpenAI, upstream: ObedientUpstream) -> None:
    ask(client, "default/weatheragent", "say plain body")
    body = upstream.find("plain body")[0].body
    assert body["model"] == "test-model"
    assert not {"reasoning_effort", "verbosity", "store", "reasoning"} & set(body)


def test_a_failing_tool_is_told_to_the_model_without_detail_to_the_client(
    client: OpenAI, upstream: ObedientUpstream
) -> None:
    answer = ask(client, "default/tooltrouble", "call soft ;; say recovered")
    assert answer == "recovered"
    with pytest.raises(openai.InternalServerError) as failure:
        ask(client, "default/tooltrouble", "call hard ;; say never")
    assert "canary-hard-detail" not in str(failure.value)
    assert failure.value.response.headers["x-should-retry"] == "false"


def test_unknown_tool_and_too_many_turns(client: OpenAI, upstream: ObedientUpstream) -> None:
    endless = " ;; ".join(['call get_weather {"city":"Loop"}'] * 30)
    answer = client.chat.completions.create(
        model="default/weatheragent", messages=[{"role": "user", "content": endless}]
    )
    assert answer.choices[0].finish_reason == "length"
    assert len(upstream.find('{\\"city\\":\\"Loop\\"}')) <= 11


def test_third_party_style_file_drops_in_unchanged(client: OpenAI, upstream: ObedientUpstream) -> None:
    answer = ask(client, "default/rootagentstyle", 'call search_notes {"query":"moss","limit":2} ;; echo')
    assert "note 1 about moss" in answer


def test_several_agents_in_a_ring_load_or_say_which_line_settles_it(gateway: Gateway) -> None:
    entry = next(e for name, e in gateway.listing().items() if name.startswith("default/airlinedesk"))
    if entry["status"] == "error":
        said = json.dumps(entry)
        assert "triage_agent" in said and "faq_agent" in said and "__agents__" in said
    else:
        assert "default/airlinedesk" in gateway.model_ids()


def test_history_with_tool_calls_and_images_is_translated(client: OpenAI, upstream: ObedientUpstream) -> None:
    pixel = "data:image/png;base64,iVBORw0KGgo="
    client.chat.completions.create(
        model="default/weatheragent",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": "say first"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "call_x", "type": "function", "function": {"name": "clock", "arguments": '{"zone":"UTC"}'}}
                ],
            },
            {"role": "tool", "tool_call_id": "call_x", "content": "noon"},
            {"role": "assistant", "content": "It is noon."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "say translated history"},
                    {"type": "image_url", "image_url": {"url": pixel}},
                ],
            },
        ],
    )
    messages = upstream.find("translated history")[0].messages
    roles = [m["role"] for m in messages]
    assert [r for r in roles if r not in ("system", "developer")] == ["user", "assistant", "tool", "assistant", "user"]
    assert "Be brief." in upstream.find("translated history")[0].system
    call = next(m for m in messages if m.get("tool_calls"))
    assert call["tool_calls"][0]["id"] == "call_x"
    assert pixel in json.dumps(messages[-1])


def test_response_format_of_the_request_reaches_the_upstream(client: OpenAI, upstream: ObedientUpstream) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    answer = ask(
        client,
        "default/weatheragent",
        'say {"n": 41}',
        response_format={"type": "json_schema", "json_schema": {"name": "number", "schema": schema, "strict": True}},
    )
    assert json.loads(answer) == {"n": 41}
    sent = upstream.find('{\\"n\\": 41}')[0].body["response_format"]
    assert sent["json_schema"]["schema"]["required"] == ["n"]


def test_many_answers_at_once_are_refused_with_the_reason(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        ask(client, "default/weatheragent", "say n", n=2)
    assert refusal.value.param == "n"


@pytest.mark.parametrize("model", ["default/weatheragent", "local/test-model"])
def test_fields_that_only_some_upstreams_know_travel_unchanged(
    client: OpenAI, upstream: ObedientUpstream, model: str
) -> None:
    ask(
        client, model, f"say extra fields {model}", extra_body={"top_k": 5, "chat_template_kwargs": {"thinking": False}}
    )
    sent = upstream.find(f"extra fields {model}")[0].body
    assert sent["top_k"] == 5
    assert sent["chat_template_kwargs"] == {"thinking": False}


def test_twenty_requests_at_once_do_not_mix(client: OpenAI) -> None:
    def one(index: int) -> bool:
        text = f'call get_weather {{"city":"City{index}"}} ;; echo'
        run = (
            ask_streamed(client, "default/weatheragent", text)[0]
            if index % 2
            else ask(client, "default/weatheragent", text)
        )
        return run == f"The weather in City{index} is sunny"

    with ThreadPoolExecutor(20) as pool:
        assert all(pool.map(one, range(60)))
