"""Promises tied to tests: what the product's documents promise, by id, and the tests that would fail without it.

Ids are those of the product inventory (``G-`` the gateway's own document, ``AC-`` acceptance scenarios, ``W-`` defects
of earlier implementations, ``P-`` the numbered guarantees of the README). A promise stands either in `PROVED`, with
tests as ``file::name`` below ``tests/``, or in `NOT_YET_BUILT`; `tests/test_requirements.py` holds both to the truth.
"""

from __future__ import annotations

WEATHER = "e2e/test_weather.py::"
CANONICAL = "e2e/test_canonical_agents.py::"
WIRE = "e2e/test_stream_wire.py::"
REFUSALS = "e2e/test_refusals.py::"
ROUTES = "e2e/test_every_route.py::"
FAULTS = "e2e/test_upstream_faults.py::"
INPUT = "e2e/test_bad_input.py::"
RELOAD = "e2e/test_hot_reload.py::"
STORM = "e2e/test_reload_storm.py::"
BROKEN = "e2e/test_broken_dropins.py::"
LOGS = "e2e/test_ids_and_logs.py::"
TOOLS = "e2e/test_client_tools.py::"
LEAVES = "e2e/test_client_leaves.py::"
MCP = "e2e/test_mcp.py::"
START = "e2e/test_quick_start.py::"
SMOKE = "test_smoke_gateway.py::"
KEYS = "unit/test_keys.py::"
EXECUTOR = "unit/test_executor.py::"

PROVED: dict[str, tuple[str, ...]] = {
    "AC-1": (
        WEATHER + "test_weather_agent_dropped_into_a_running_gateway_is_served_within_seconds",
        WEATHER + "test_official_client_lists_and_chats_at_root_and_v1",
        WEATHER + "test_official_client_streams_and_the_tool_is_really_called",
        WEATHER + "test_weather_agent_is_the_readmes_own",
    ),
    "AC-2": (
        WEATHER + "test_stray_init_file_in_the_drop_in_folder_is_explained_in_one_sentence",
        WEATHER + "test_stray_init_file_in_a_checkouts_own_agents_folder_is_explained",
    ),
    "AC-3": (
        CANONICAL + "test_handoff_and_the_specialists_tool",
        CANONICAL + "test_input_guardrail_refuses_before_the_model_is_asked",
        CANONICAL + "test_output_guardrail_withholds_the_text_plain_and_streamed",
        CANONICAL + "test_hooks_see_the_run",
        CANONICAL + "test_structured_output_is_json_in_the_content",
        CANONICAL + "test_two_agents_of_one_file_are_two_models",
        CANONICAL + "test_factories_async_and_with_sibling_file",
    ),
    "AC-4": (
        RELOAD + "test_an_edit_during_a_stream_changes_the_next_request_not_this_one",
        RELOAD + "test_syntax_error_keeps_the_last_good_version_and_is_visible",
    ),
    "AC-5": (BROKEN + "test_nothing_denied_was_executed",),
    "AC-6": (REFUSALS + "test_refusal_has_its_status_and_openais_shape",),
    "AC-9": (
        ROUTES + "test_without_a_key",
        ROUTES + "test_fastapi_serves_nothing_that_the_route_table_does_not_have",
        ROUTES + "test_no_suffix_opens_a_route",
    ),
    "AC-17": (
        MCP + "test_http_server_is_used_and_its_restart_survived",
        MCP + "test_stdio_server_is_started_once_restarted_after_its_death_and_ends_with_its_generation",
    ),
    "AC-20": (
        "test_docs.py::test_every_relative_link_resolves",
        "test_docs.py::test_every_make_target_named_exists",
        "test_docs.py::test_every_variable_named_exists",
    ),
    "G-01": (
        CANONICAL + "test_fixed_model_name_is_mapped_and_settings_arrive",
        CANONICAL + "test_history_with_tool_calls_and_images_is_translated",
        CANONICAL + "test_response_format_of_the_request_reaches_the_upstream",
        CANONICAL + "test_many_answers_at_once_are_refused_with_the_reason",
        WIRE + "test_whole_answer_validates",
    ),
    "G-02": (
        WIRE + "test_one_id_role_first_finish_last_done",
        WIRE + "test_usage_chunk_when_asked_for",
        WIRE + "test_finish_reason_is_true",
        WIRE + "test_first_event_is_delivered_while_the_upstream_still_writes",
        WIRE + "test_silence_is_filled_with_comments",
        WIRE + "test_a_broken_stream_ends_with_an_error_object_and_no_done",
        LEAVES + "test_streamed_after_some_tokens",
    ),
    "G-03": (
        REFUSALS + "test_refusal_has_its_status_and_openais_shape",
        REFUSALS + "test_official_client_raises_its_own_exceptions",
        INPUT + "test_bad_body_is_a_400_that_says_what_is_wrong",
        INPUT + "test_wrong_method_and_unknown_path",
    ),
    "G-04": (
        REFUSALS + "test_models_are_listed_and_described_by_what_the_key_reaches",
        REFUSALS + "test_models_say_nothing_about_the_server_to_ordinary_keys",
    ),
    "G-05": (BROKEN + "test_each_is_listed_with_kind_file_cause_and_fix",),
    "G-06": (RELOAD + "test_refresh_on_request_without_a_watcher",),
    "G-07": (BROKEN + "test_each_is_among_the_errors_the_log_and_the_metric",),
    "G-08": ("e2e/test_relayed_surfaces.py::test_upstreams_are_shown_and_refreshed",),
    "G-13": (LOGS + "test_metrics_as_json_and_for_prometheus",),
    "G-14": (LOGS + "test_metrics_as_json_and_for_prometheus",),
    "G-15": (LOGS + "test_health_is_liveness_and_readyz_waits_for_agents",),
    "G-16": (ROUTES + "test_openapi_document_names_every_route_but_no_alias",),
    "G-17": (ROUTES + "test_every_route_of_the_table_works_with_an_admin_key",),
    "G-18": (WEATHER + "test_key_in_x_api_key_header",),
    "G-19": (
        LOGS + "test_every_answer_has_a_request_id",
        LOGS + "test_one_request_can_be_followed_through_the_log",
    ),
    "G-20": (REFUSALS + "test_a_chat_key_does_not_reach_admin_routes",),
    "G-30": (
        CANONICAL + "test_every_canonical_agent_is_listed_and_internal_ones_are_not",
        WEATHER + "test_aliases_reach_the_same_agent",
    ),
    "G-31": (
        CANONICAL + "test_every_canonical_agent_is_listed_and_internal_ones_are_not",
        CANONICAL + "test_the_root_of_several_agents_is_the_one_nobody_hands_to",
    ),
    "G-32": (CANONICAL + "test_two_agents_of_one_file_are_two_models",),
    "G-33": (REFUSALS + "test_models_are_listed_and_described_by_what_the_key_reaches",),
    "G-36": (BROKEN + "test_nothing_denied_was_executed",),
    "G-37": (
        BROKEN + "test_each_is_listed_with_kind_file_cause_and_fix",
        BROKEN + "test_healthy_neighbours_are_served",
    ),
    "G-39": (BROKEN + "test_nothing_denied_was_executed",),
    "G-40": (
        RELOAD + "test_add_change_delete",
        RELOAD + "test_rename_of_a_folder",
        RELOAD + "test_helper_files_inside_the_folder",
        RELOAD + "test_helper_files_outside_the_folder",
        RELOAD + "test_same_size_edit_in_the_same_second",
        STORM + "test_no_healthy_stream_fails_or_is_cut",
    ),
    "G-41": (
        CANONICAL + "test_handoff_and_the_specialists_tool",
        CANONICAL + "test_agent_as_tool_with_a_tool_of_its_own",
        CANONICAL + "test_runner_run_inside_a_guardrail_uses_the_gateways_upstream",
        CANONICAL + "test_context_is_given_to_instructions_and_tools",
        MCP + "test_http_server_is_used_and_its_restart_survived",
    ),
    "G-42": (RELOAD + "test_yaml_agents_appear_change_and_win_over_a_drop_in",),
    "G-50": (RELOAD + "test_yaml_agents_appear_change_and_win_over_a_drop_in",),
    "G-34": ("unit/test_declarative_agents.py::test_defaults_hold_for_drop_ins_that_name_nothing",),
    "G-35": (
        "unit/test_discovery.py::test_requirements_that_are_missing_or_of_a_wrong_version",
        "test_repository.py::test_dependencies_of_agents_are_shown_before_anything_is_installed",
    ),
    "G-38": (
        "unit/test_discovery.py::test_extra_roots_come_after_the_first",
        "unit/test_discovery.py::test_a_package_as_root",
    ),
    "G-51": (
        EXECUTOR + "test_no_tool_runs_where_the_limit_of_hops_is_zero",
        EXECUTOR + "test_more_tool_hops_than_allowed_is_an_error_that_says_so",
    ),
    "G-52": (
        "unit/test_upstreams_config.py::test_presets_fill_the_address",
        "unit/test_upstreams_config.py::test_mistake_in_the_file_is_named",
        "e2e/test_routing.py::test_a_plain_name_is_served_in_order_of_priority_for_clients_and_agents",
        "e2e/test_routing.py::test_a_breaker_leaves_a_dead_upstream_alone_and_lets_it_come_back",
    ),
    "G-59": (
        "unit/test_instrument.py::test_everything_reachable_is_found_once_cycles_included",
        LOGS + "test_metrics_as_json_and_for_prometheus",
    ),
    "G-70": (
        KEYS + "test_everything_a_key_may_say",
        KEYS + "test_a_wrong_file_is_refused_with_the_sentence_that_mends_it",
    ),
    "G-72": (KEYS + "test_a_key_without_a_list_inherits_the_defaults",),
    "G-75": (
        KEYS + "test_without_any_key_configured_a_local_caller_needs_none",
        REFUSALS + "test_production_without_a_key_does_not_start_and_says_how_to_make_one",
    ),
    "G-76": (KEYS + "test_the_environments_key_is_an_admin_beside_those_of_the_file",),
    "G-77": (
        KEYS + "test_production_refuses_the_dev_key_beside_a_good_one",
        REFUSALS + "test_production_does_not_know_the_development_key",
    ),
    "G-80": (
        "unit/test_settings.py::test_a_wrong_value_names_its_variable",
        "test_docs.py::test_every_setting_is_documented",
    ),
    "G-90": (LOGS + "test_every_line_of_the_log_is_json_with_the_same_fields",),
    "G-91": ("unit/test_metrics.py::test_the_names_that_dashboards_know",),
    "G-93": ("unit/test_metrics.py::test_recent_errors_keep_the_last_ones_newest_first",),
    "G-100": ("test_docs.py::test_every_make_target_named_exists",),
    "G-103": ("test_packaging.py::test_the_sbom_is_valid_and_names_every_locked_package",),
    "G-108": ("test_docs.py::test_every_page_is_reached_from_the_index",),
    "G-110": (SMOKE + "test_it_answers_and_its_tool_is_really_called",),
    "G-111": (START + "test_the_documented_curl_lists_models",),
    "G-114": ("test_docs.py::test_every_page_is_reached_from_the_index",),
    "G-116": (SMOKE + "test_it_streams",),
    "G-112": (WEATHER + "test_official_client_lists_and_chats_at_root_and_v1",),
    "W-01": (WEATHER + "test_official_client_streams_and_the_tool_is_really_called",),
    "W-02": (BROKEN + "test_nothing_denied_was_executed",),
    "W-03": (RELOAD + "test_same_size_edit_in_the_same_second",),
    "W-04": (WEATHER + "test_official_client_streams_and_the_tool_is_really_called",),
    "W-05": (MCP + "test_http_server_is_used_and_its_restart_survived",),
    "W-07": (CANONICAL + "test_usage_is_the_sum_over_all_inner_model_calls",),
    "W-12": (ROUTES + "test_no_suffix_opens_a_route",),
    "W-27": (WEATHER + "test_weather_agent_dropped_into_a_running_gateway_is_served_within_seconds",),
    "P-1": (
        FAULTS + "test_plain",
        FAULTS + "test_streamed_before_any_token",
        WIRE + "test_a_broken_stream_ends_with_an_error_object_and_no_done",
    ),
    "P-2": (
        FAULTS + "test_an_upstream_that_never_answers_is_given_up_in_time",
        FAULTS + "test_a_stream_that_stops_or_only_comments_is_given_up_in_time",
    ),
    "P-3": (
        LEAVES + "test_streamed_after_some_tokens",
        LEAVES + "test_before_the_first_token",
        LEAVES + "test_in_an_inner_agents_call",
    ),
    "P-7": (
        BROKEN + "test_healthy_neighbours_are_served",
        RELOAD + "test_syntax_error_keeps_the_last_good_version_and_is_visible",
        STORM + "test_no_healthy_stream_fails_or_is_cut",
    ),
    "P-4": (
        REFUSALS + "test_refusal_has_its_status_and_openais_shape",
        REFUSALS + "test_hidden_foreign_models_do_not_exist",
        "unit/test_acl.py::test_it_agrees_with_a_reference_written_another_way",
        TOOLS + "test_what_a_turn_left_behind_belongs_to_the_key_that_left_it",
    ),
    "P-8": (FAULTS + "test_an_endless_line_is_cut_and_memory_stays",),
    "P-10": (LOGS + "test_no_secret_and_no_prompt_is_in_the_log",),
}
"""Promise → the tests that prove it."""


def _ids(prefix: str, *numbers: int, digits: int = 2) -> frozenset[str]:
    return frozenset(f"{prefix}-{number:0{digits}}" for number in numbers)


NOT_YET_BUILT: dict[str, frozenset[str]] = {
    "administration of upstreams, tools and security": _ids("G", 9, 10, 11, 12, 61),
    "gateway tools": _ids("G", *range(53, 59), 60),
    "limits, overrides, decisions": _ids("G", 71, 73, 74),
    "operations: dashboards, images, releases, audits, load": _ids("G", 92, 101, 102, *range(104, 108), 109, 113, 115),
    "durable runs, memory, teams, policies": _ids(
        "A",
        *range(1, 12),
        *range(20, 31),
        *range(40, 52),
        *range(60, 73),
        *range(80, 89),
        *range(90, 103),
        *range(110, 121),
    ),
    "the agent runtime": _ids("R", *range(1, 18)),
    "the workforce backend": _ids(
        "U",
        *range(1, 8),
        *range(10, 14),
        *range(20, 26),
        *range(30, 35),
        *range(40, 42),
        *range(50, 54),
        *range(60, 68),
    ),
    "tasks and orchestration": _ids("T", *range(1, 9), *range(10, 26)),
    "acceptance scenarios of later capabilities": _ids("AC", 7, 8, *range(10, 17), 18, 19, digits=1),
    "defects to avoid in later capabilities": _ids("W", 6, *range(8, 12), *range(13, 27), 28, 29),
    "guarantees of later capabilities": _ids("P", 5, 6, 9, *range(11, 16), digits=1),
}
"""What is promised and not built, by the capability it belongs to."""
