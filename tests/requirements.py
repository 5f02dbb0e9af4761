"""Promises tied to tests: what the product's documents promise, by id, and the tests that would fail without it.

Ids are those of the product inventory (``G-`` the gateway's own document, ``AC-`` acceptance scenarios, ``W-`` defects
of earlier implementations, ``P-`` the numbered guarantees of the README). A promise stands either in `PROVED`, with
tests as ``file::name`` below ``tests/``, or in `NOT_YET_BUILT`; `tests/test_requirements.py` holds both to the truth.
What is missing of one that is kept in part stands in `STILL_MISSING`.
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
GATEWAY_TOOLS = "e2e/test_tools.py::"
LEAVES = "e2e/test_client_leaves.py::"
MCP = "e2e/test_mcp.py::"
MCP_FACE = "e2e/test_mcp_face.py::"
MCP_TOOLS = "unit/test_mcp_provider.py::"
START = "e2e/test_quick_start.py::"
SMOKE = "test_smoke_gateway.py::"
AUDIT = "unit/test_audit.py::"
WHO = "e2e/test_who.py::"
KEYS = "unit/test_keys.py::"
LIMITS = "e2e/test_limits.py::"
EDGE = "e2e/test_edge.py::"
WORKERS = "e2e/test_workers.py::"
ACCESS = "e2e/test_access.py::"
CONNECTIONS = "e2e/test_connection_limits.py::"
CREDENTIALS = "e2e/test_credentials.py::"
EXECUTOR = "unit/test_executor.py::"
JAIL = "e2e/test_jailed_tools.py::"
RESEARCH = "e2e/test_research.py::"
LENT = "e2e/test_lent_keys.py::"
REGISTERED = "e2e/test_registered_tools.py::"

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
    "G-10": (ACCESS + "test_refresh_lists_keys_without_material_and_a_broken_file_changes_nothing",),
    "G-11": (ACCESS + "test_preview_takes_the_key_and_says_why",),
    "G-12": (
        ACCESS + "test_an_override_opens_a_model_to_one_key_shows_everywhere_and_ends",
        ACCESS + "test_a_user_key_may_neither_ask_nor_grant",
    ),
    "W-08": (ACCESS + "test_a_user_key_may_neither_ask_nor_grant",),
    "AC-6": (REFUSALS + "test_refusal_has_its_status_and_openais_shape",),
    "U-01": (
        "unit/test_edge.py::test_which_page_may_call",
        EDGE + "test_a_browser_asks_without_a_key_and_calls_with_one",
    ),
    "U-04": (EDGE + "test_every_answer_is_harmless_to_a_browser",),
    "A-02": (
        WHO + "test_a_correlation_id_is_the_callers_or_the_requests_own",
        CREDENTIALS + "test_fifty_callers_at_once_each_read_their_own",
        CREDENTIALS + "test_every_kind_of_header_is_there_by_its_name",
        CREDENTIALS + "test_they_are_written_nowhere_and_sent_to_no_upstream",
    ),
    "A-03": (CREDENTIALS + "test_every_kind_of_header_is_there_by_its_name",),
    "A-01": (WHO + "test_a_refusal_has_its_ids_and_the_log_knows_whom_it_met",),
    "A-10": (
        "unit/test_settings.py::test_every_promised_setting_has_its_variable",
        "e2e/test_log_text.py::test_every_line_is_text_and_holds_no_more_than_json_would",
        "unit/test_edge.py::test_which_page_may_call",
        KEYS + "test_a_wrong_file_is_refused_with_the_sentence_that_mends_it",
    ),
    "A-114": (
        "unit/test_metrics.py::test_names_of_other_gateways_lead_to_metrics_that_exist",
        "e2e/test_access_metrics.py::test_callers_and_decisions_on_them_are_counted",
        "e2e/test_access_metrics.py::test_an_address_that_guesses_is_counted_as_throttled",
        CREDENTIALS + "test_what_was_not_sent_is_said",
        CREDENTIALS + "test_every_kind_of_header_is_there_by_its_name",
        "e2e/test_stored_keys.py::test_a_key_is_made_used_rotated_and_revoked_over_two_processes",
        GATEWAY_TOOLS + "test_a_key_without_the_right_executes_nothing",
        LOGS + "test_metrics_as_json_and_for_prometheus",
    ),
    "A-11": ("unit/test_edge.py::test_which_page_may_call",),
    "A-09": (
        "e2e/test_providers.py::test_each_is_asked_and_one_that_is_down_takes_nobody_along",
        "e2e/test_providers.py::test_an_operator_says_what_readiness_needs",
        WHO + "test_the_key_says_who_one_is",
        WHO + "test_how_one_shows_who_one_is_needs_no_key",
    ),
    "A-08": (
        "e2e/test_error_table.py::test_a_failure_is_what_the_table_says",
        "e2e/test_author_exceptions.py::test_wherever_it_is_raised",
        "e2e/test_author_exceptions.py::test_whatever_is_raised",
    ),
    "U-05": (
        WHO + "test_requests_at_once_share_no_ids",
        LOGS + "test_an_odd_request_id_is_replaced",
    ),
    "U-06": (WORKERS + "test_recent_errors_and_endpoint_times_come_from_all_workers",),
    "U-07": (EDGE + "test_health_shows_its_parts_to_admins_alone",),
    "W-06": (
        WORKERS + "test_any_worker_shows_all_and_a_killed_one_takes_nothing_along",
        LIMITS + "test_two_processes_admit_exactly_as_many_as_the_limit_says",
    ),
    "AC-7": (
        LIMITS + "test_two_processes_admit_exactly_as_many_as_the_limit_says",
        "e2e/test_shared_limits.py::test_the_eleventh_request_is_refused_whichever_process_gets_it",
    ),
    # Limits hold for keys; an address is only kept from guessing them, and is believed of declared proxies alone.
    "U-02": (
        "unit/test_edge.py::test_which_forwarded_address_is_believed",
        "unit/test_edge.py::test_nobody_is_believed_by_default",
        "unit/test_throttle.py::test_after_the_limit_a_guessed_key_is_not_told_from_a_wrong_one",
    ),
    "U-50": tuple(
        f"e2e/test_model_config.py::{name}"
        for name in (
            "test_a_category_has_settings_where_the_request_says_nothing",
            "test_whoever_answers_is_given_the_settings_of_the_name_that_was_asked_for",
            "test_the_operators_word_counts_before_the_authors_and_the_requests_before_both",
            "test_the_fallback_answers_when_the_first_model_fails",
            "test_a_mistake_is_said_with_its_file_and_mended_while_it_runs",
        )
    ),
    "U-51": (
        "unit/test_upstreams_config.py::test_keys_come_from_the_environment",
        "unit/test_upstreams_config.py::test_file_wins_over_the_openai_key",
        "unit/test_upstreams_config.py::test_mistake_is_named",
        START + "test_an_openai_key_in_the_environment_never_reaches_an_agent",
        KEYS + "test_production_refuses_the_dev_key_beside_a_good_one",
    ),
    "U-53": (
        "unit/test_upstreams_config.py::test_presets_fill_the_address",
        "unit/test_upstream_keys.py::test_the_key_goes_where_the_provider_wants_it",
    ),
    "U-52": (
        "unit/test_ledger.py::test_a_relayed_call_is_one_row_and_an_agents_run_one_and_one_for_each_call",
        "unit/test_ledger.py::test_sums_by_any_group_are_exact_and_come_in_pages",
        "e2e/test_usage_ledger.py::test_calls_of_two_processes_stand_in_one_ledger",
        "e2e/test_usage_ledger.py::test_a_store_that_is_down_costs_no_call_and_is_said_where_it_is_needed",
        "unit/test_ledger.py::test_a_flush_of_a_thousand_rows_leaves_the_loop_its_turns",
        LENT + "test_a_call_is_made_with_the_callers_key",
        LENT + "test_the_gateways_key_serves_who_brings_none",
        LENT + "test_agents_and_those_they_ask_call_models_with_the_keys_of_their_run",
    ),
    "U-03": ("e2e/test_served.py::test_bodies_have_ten_megabytes_and_uploads_fifty",),
    "AC-9": (
        ROUTES + "test_without_a_key",
        ROUTES + "test_each_scope_opens_its_own_routes_and_no_other",
        ROUTES + "test_a_key_counts_in_its_header_alone",
        ROUTES + "test_no_spelling_of_a_target_opens_anything",
        ROUTES + "test_fastapi_serves_nothing_that_the_route_table_does_not_have",
        ROUTES + "test_no_suffix_opens_a_route",
        "e2e/test_served.py::test_every_route_but_the_public_ones_needs_a_key",
    ),
    "AC-17": (
        MCP + "test_http_server_is_used_and_its_restart_survived",
        MCP + "test_stdio_server_is_started_once_restarted_after_its_death_and_ends_with_its_generation",
        MCP_TOOLS + "test_an_http_server_is_killed_and_restarted_between_and_during_calls",
        "unit/test_mcp_session.py::test_a_server_killed_between_two_calls_is_started_again",
    ),
    "AC-18": (
        "e2e/test_canary.py::test_no_mark_is_left_anywhere",
        CREDENTIALS + "test_they_are_written_nowhere_and_sent_to_no_upstream",
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
    "G-13": (
        LOGS + "test_metrics_as_json_and_for_prometheus",
        "unit/test_metrics.py::test_the_json_snapshot_is_the_documented_one",
    ),
    "G-14": (
        LOGS + "test_metrics_as_json_and_for_prometheus",
        "unit/test_admin.py::test_the_exposition_can_be_switched_off",
    ),
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
    "G-50": (
        RELOAD + "test_yaml_agents_appear_change_and_win_over_a_drop_in",
        "unit/test_declarative_agents.py::test_defaults_apply_before_anything_is_checked",
        "unit/test_declarative_agents.py::test_an_agent_by_module_name",
    ),
    "G-34": (
        "unit/test_declarative_agents.py::test_defaults_hold_for_drop_ins_that_name_nothing",
        "unit/test_declarative_agents.py::test_an_unknown_upstream_or_model_is_refused_with_the_fix",
    ),
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
        "unit/test_translation.py::test_the_smallest_token_limit_wins",
    ),
    "G-52": (
        "unit/test_upstreams_config.py::test_presets_fill_the_address",
        "unit/test_upstreams_config.py::test_mistake_in_the_file_is_named",
        "e2e/test_routing.py::test_a_plain_name_is_served_in_order_of_priority_for_clients_and_agents",
        "e2e/test_routing.py::test_a_breaker_leaves_a_dead_upstream_alone_and_lets_it_come_back",
    ),
    "G-09": (
        GATEWAY_TOOLS + "test_the_list_is_the_keys_own",
        "e2e/test_tool_approval.py::test_a_server_that_offers_nothing_is_shown_with_the_reason",
        GATEWAY_TOOLS + "test_a_refresh_drops_old_callables_while_running_calls_finish",
    ),
    "G-53": (
        GATEWAY_TOOLS + "test_a_call_carries_the_runs_context",
        GATEWAY_TOOLS + "test_operations_of_a_document_are_tools",
        "unit/test_tools_config.py::test_a_wrong_file_is_refused_with_the_sentence_that_mends_it",
    ),
    "G-54": (GATEWAY_TOOLS + "test_a_module_that_is_not_allowed_is_403_and_was_not_imported",),
    "G-55": (
        GATEWAY_TOOLS + "test_http_tools_cannot_reach_inside",
        GATEWAY_TOOLS + "test_http_tools_are_bounded_and_follow_nothing",
        GATEWAY_TOOLS + "test_only_what_changes_nothing_a_second_time_is_tried_again",
        "unit/test_tool_network.py::test_a_name_that_changes_its_mind_is_asked_once_per_connection",
    ),
    "P-13": (
        MCP_TOOLS + "test_a_changed_tool_is_not_offered_until_it_is_approved",
        MCP_FACE + "test_a_changed_tool_is_withheld_until_an_admin_accepts_it_and_stays_accepted",
    ),
    "G-56": (
        MCP_TOOLS + "test_an_http_server_is_killed_and_restarted_between_and_during_calls",
        MCP_TOOLS + "test_every_caller_has_the_credential_that_is_meant_for_it",
        MCP_FACE + "test_progress_of_tools_and_agents_is_told",
    ),
    "G-57": (
        "unit/test_tool_schemas.py::test_arguments_that_do_not_fit_say_where",
        "unit/test_tool_schemas.py::test_a_hostile_schema_or_value_ends_soon",
    ),
    "G-58": (
        GATEWAY_TOOLS + "test_an_agent_calls_a_gateway_tool_with_the_tools_own_schema",
        GATEWAY_TOOLS + "test_agents_are_there_and_a_missing_tool_is_a_warning",
        GATEWAY_TOOLS + "test_a_forbidden_call_is_executed_never",
        "unit/test_gateway_tools.py::test_outside_of_a_run_it_says_so",
    ),
    "A-22": tuple(
        f"e2e/test_registered_tools.py::{name}"
        for name in (
            "test_a_tool_is_registered_served_by_every_worker_and_deleted",
            "test_a_server_and_a_document_are_registered_and_found",
            "test_what_a_request_may_not_say_is_refused_with_the_reason",
            "test_a_registered_tool_cannot_reach_inside_but_where_the_operator_says",
            "test_what_was_registered_is_there_after_a_restart_and_gone_when_the_operator_says_so",
        )
    ),
    "A-65": (
        "unit/test_tool_schemas.py::test_undeclared_names_are_dropped_where_the_schema_says_nothing_of_them",
        GATEWAY_TOOLS + "test_a_callable_that_raises_ran_once",
    ),
    "G-60": (GATEWAY_TOOLS + "test_calls_are_counted_and_logged_without_arguments",),
    "G-61": (
        GATEWAY_TOOLS + "test_the_file_is_watched",
        GATEWAY_TOOLS + "test_documents_and_secrets_are_watched_with_the_file_that_names_them",
        GATEWAY_TOOLS + "test_a_refresh_drops_old_callables_while_running_calls_finish",
    ),
    "G-59": (
        GATEWAY_TOOLS + "test_calls_are_counted_and_logged_without_arguments",
        "unit/test_instrument.py::test_everything_reachable_is_found_once_cycles_included",
        LOGS + "test_metrics_as_json_and_for_prometheus",
    ),
    "G-70": (
        KEYS + "test_everything_a_key_may_say",
        KEYS + "test_a_wrong_file_is_refused_with_the_sentence_that_mends_it",
    ),
    "G-71": (
        "e2e/test_access_property.py::test_every_way_to_a_model_agrees_with_the_reference",
        "e2e/test_access.py::test_an_override_opens_a_model_to_one_key_shows_everywhere_and_ends",
    ),
    "G-72": (KEYS + "test_a_key_without_a_list_inherits_the_defaults",),
    "G-75": (
        KEYS + "test_without_any_key_configured_a_local_caller_needs_none",
        REFUSALS + "test_production_without_a_key_does_not_start_and_says_how_to_make_one",
    ),
    "G-76": (KEYS + "test_the_environments_key_is_an_admin_beside_those_of_the_file",),
    "G-74": ("unit/test_stored_keys.py::test_an_end_within_a_week_is_said_once_a_day",),
    "G-77": (
        "unit/test_stored_keys.py::test_a_pepper_is_needed_to_honour_what_was_stored_with_it",
        "e2e/test_stored_keys.py::test_a_key_is_made_used_rotated_and_revoked_over_two_processes",
        "e2e/test_stored_keys.py::test_an_outage_of_the_store_is_never_a_401",
        KEYS + "test_production_refuses_the_dev_key_beside_a_good_one",
        REFUSALS + "test_production_does_not_know_the_development_key",
    ),
    "G-80": (
        "unit/test_settings.py::test_a_wrong_value_names_its_variable",
        "test_docs.py::test_every_setting_is_documented",
    ),
    "G-73": (
        LIMITS + "test_two_processes_admit_exactly_as_many_as_the_limit_says",
        LIMITS + "test_the_request_after_the_last_is_refused_as_openai_does",
        "unit/test_limiter.py::test_a_limit_that_is_raised_keeps_what_was_counted",
    ),
    "G-90": (
        LOGS + "test_every_line_of_the_log_is_json_with_the_same_fields",
        "unit/test_logs.py::test_what_is_known_of_a_request_is_on_its_lines_and_a_lines_own_word_counts_first",
        "unit/test_logs.py::test_two_hundred_requests_at_once_share_no_word",
    ),
    "G-91": ("unit/test_metrics.py::test_the_names_that_dashboards_know",),
    "G-93": ("unit/test_metrics.py::test_recent_errors_keep_the_last_ones_newest_first",),
    "G-92": (
        "test_monitoring.py::test_an_expression_names_only_what_exists",
        "test_monitoring.py::test_the_reader_sees_what_does_not_exist",
        "test_monitoring.py::test_an_alert_says_how_urgent_it_is_and_where_its_help_is",
        "test_monitoring.py::test_the_scrape_configuration_reads_what_the_gateway_serves",
    ),
    "G-100": (
        "test_docs.py::test_every_make_target_named_exists",
        "test_operations.py::test_every_promised_target_is_there_explained_and_does_something",
    ),
    "G-101": (
        "test_repository.py::test_the_image_runs_without_rights_in_production",
        "test_packaging.py::test_the_images_command_serves_the_stack_of_compose_without_rights",
    ),
    "G-102": (
        "test_repository.py::test_compose_holds_the_gateway_a_demo_upstream_and_what_watches_them",
        "test_packaging.py::test_the_images_command_serves_the_stack_of_compose_without_rights",
        "test_monitoring.py::test_grafana_finds_its_data_source_and_its_dashboard",
    ),
    "G-103": (
        "test_packaging.py::test_the_sbom_is_valid_and_names_every_locked_package",
        "test_operations.py::test_the_sbom_has_the_locks_hashes_and_says_which_are_missing",
    ),
    "G-104": (
        AUDIT + "test_keys_of_the_file",
        AUDIT + "test_keys_of_the_database_are_audited",
        AUDIT + "test_files_that_no_agent_reaches",
        AUDIT + "test_packages_are_asked_about_all_of_them",
        AUDIT + "test_what_is_installed_is_compared_with_the_lock",
        AUDIT + "test_a_service_that_does_not_answer_is_a_failure_that_says_how_many",
        AUDIT + "test_the_exit_code_tells",
    ),
    "G-105": (
        "test_operations.py::test_workflows_call_targets_and_files_that_exist",
        "test_operations.py::test_the_suite_runs_on_every_supported_python_with_real_servers",
        "test_operations.py::test_the_audit_runs_every_night_and_its_failure_is_reported",
        "test_operations.py::test_a_release_is_signed_from_its_tag",
    ),
    "G-106": (
        "test_operations.py::test_a_release_checks_builds_signs_and_tags",
        "test_operations.py::test_nothing_is_tagged_when_a_step_fails",
    ),
    "G-107": ("e2e/test_load.py::test_the_load_test_mixes_seven_to_three",),
    "G-109": ("test_repository.py::test_the_windows_script_does_what_make_run_does",),
    "G-113": (
        "test_operations.py::test_a_release_is_refused",
        "test_operations.py::test_a_release_of_a_dirty_tree_or_of_a_tag_that_exists_is_refused",
        "test_operations.py::test_where_an_engine_answers_the_image_is_built_pushed_and_signed_by_its_digest",
    ),
    "G-115": (
        "e2e/test_troubleshooting.py::test_the_rows_that_a_running_gateway_shows",
        "e2e/test_troubleshooting.py::test_the_sdk_is_not_installed",
    ),
    "G-108": (
        "test_docs.py::test_every_page_is_reached_from_the_index",
        "test_docs.py::test_the_pages_that_were_promised_are_there",
    ),
    "G-110": (SMOKE + "test_it_answers_and_its_tool_is_really_called",),
    "G-111": (START + "test_the_documented_curl_lists_models",),
    "G-114": (
        "test_docs.py::test_every_page_is_reached_from_the_index",
        "test_docs.py::test_the_pages_that_were_promised_are_there",
    ),
    "G-116": (
        SMOKE + "test_it_streams",
        "test_operations.py::test_the_promised_suites_exist",
    ),
    "G-112": (WEATHER + "test_official_client_lists_and_chats_at_root_and_v1",),
    "W-01": (WEATHER + "test_official_client_streams_and_the_tool_is_really_called",),
    "W-02": (BROKEN + "test_nothing_denied_was_executed",),
    "W-03": (RELOAD + "test_same_size_edit_in_the_same_second",),
    "W-04": (WEATHER + "test_official_client_streams_and_the_tool_is_really_called",),
    "W-05": (
        MCP + "test_http_server_is_used_and_its_restart_survived",
        MCP_FACE + "test_each_caller_is_offered_its_own_tools_and_agents",
        "e2e/test_tokens.py::test_the_official_mcp_client_comes_with_a_token",
        "e2e/test_tokens.py::test_mcp_clients_are_told_where_to_get_a_token",
    ),
    "W-07": (CANONICAL + "test_usage_is_the_sum_over_all_inner_model_calls",),
    "W-09": (
        ROUTES + "test_fastapi_serves_nothing_that_the_route_table_does_not_have",
        ROUTES + "test_each_scope_opens_its_own_routes_and_no_other",
    ),
    "W-16": (
        LIMITS + "test_two_processes_admit_exactly_as_many_as_the_limit_says",
        "e2e/test_budget_processes.py::test_four_processes_never_spend_more_than_the_budget",
        LIMITS + "test_end_users_are_the_same_on_every_surface",
        LIMITS + "test_the_larger_of_two_maxima_is_reserved",
    ),
    "W-17": (WEATHER + "test_official_client_lists_and_chats_at_root_and_v1",),
    "W-19": (
        GATEWAY_TOOLS + "test_a_callable_that_raises_ran_once",
        GATEWAY_TOOLS + "test_a_tool_that_raises_in_a_run_ran_once",
        GATEWAY_TOOLS + "test_only_what_changes_nothing_a_second_time_is_tried_again",
        "unit/test_mcp_servers.py::test_a_server_that_dies_in_a_call_is_not_asked_twice_and_serves_the_next",
    ),
    "W-28": (
        CONNECTIONS + "test_runs_at_a_time_have_a_limit",
        CONNECTIONS + "test_a_client_that_does_not_read_is_cut_and_its_upstream_call_ends",
        "unit/test_ledger.py::test_while_the_store_is_down_calls_go_on_rows_wait_and_what_is_too_much_is_counted",
    ),
    "U-62": (
        JAIL + "test_a_command_runs_and_says_everything_about_itself",
        JAIL + "test_what_is_not_the_callers_is_out_of_reach",
        JAIL + "test_nothing_of_the_gateway_is_handed_in",
        JAIL + "test_no_network_not_even_the_machines_own",
        JAIL + "test_a_bomb_hurts_nobody",
        JAIL + "test_a_command_past_its_time_is_ended_with_all_it_started",
        JAIL + "test_a_killed_gateway_leaves_no_command_behind",
        JAIL + "test_callers_do_not_see_each_other_and_shared_is_shared",
        JAIL + "test_file_operations",
        JAIL + "test_file_operations_that_are_refused_say_why",
        JAIL + "test_an_agent_works_in_the_jail_of_its_caller",
        JAIL + "test_without_bubblewrap_the_entry_says_what_to_install_and_nothing_runs",
        JAIL + "test_where_the_kernel_refuses_a_jail_nothing_runs_either",
        "unit/test_jail.py::test_a_call_given_up_at_any_moment_leaves_nothing",
        RESEARCH + "test_it_searches_and_reads_the_first_pages",
        RESEARCH + "test_a_page_that_cannot_be_read_is_named_and_spares_the_others",
        RESEARCH + "test_pages_inside_are_not_asked_and_what_is_no_page_is_left_out",
        RESEARCH + "test_an_agent_researches",
        # Catalogues of others, and tools that are a schema and an address.
        GATEWAY_TOOLS + "test_of_a_catalogue_of_hundreds_agents_see_what_is_included_with_their_callers_credential",
        MCP_TOOLS + "test_patterns_choose_the_tools",
        REGISTERED + "test_what_a_request_may_not_say_is_refused_with_the_reason",
        REGISTERED + "test_a_tool_is_registered_served_by_every_worker_and_deleted",
    ),
    "W-29": (START + "test_the_weather_agent_of_the_readme_answers_with_its_tool_and_no_model_configured",),
    "W-12": (ROUTES + "test_no_suffix_opens_a_route",),
    "W-27": (WEATHER + "test_weather_agent_dropped_into_a_running_gateway_is_served_within_seconds",),
    "P-1": (
        FAULTS + "test_plain",
        FAULTS + "test_streamed_before_any_token",
        WIRE + "test_a_broken_stream_ends_with_an_error_object_and_no_done",
        "unit/test_proxy_and_http2.py::test_fault_is_the_same_error_as_straight",
        "e2e/test_cache.py::test_only_finished_answers_are_kept",
    ),
    "P-2": (
        FAULTS + "test_an_upstream_that_never_answers_is_given_up_in_time",
        FAULTS + "test_a_stream_that_stops_or_only_comments_is_given_up_in_time",
    ),
    "P-3": (
        LEAVES + "test_streamed_after_some_tokens",
        LEAVES + "test_before_the_first_token",
        LEAVES + "test_in_an_inner_agents_call",
        "unit/test_proxy_and_http2.py::test_a_call_that_is_cancelled_ends_at_the_upstream_within_a_second",
        "e2e/test_cache.py::test_the_answer_goes_on_without_the_first_who_asked_and_ends_with_the_last",
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
    "P-6": (
        LIMITS + "test_an_agent_is_stopped_by_its_callers_budget_before_its_next_model_call",
        LIMITS + "test_an_agent_that_is_its_own_tool_charges_one_budget_and_stops",
        "unit/test_run_budget.py::test_each_cap_stops_the_run_and_is_named",
    ),
    "P-9": (
        LIMITS + "test_two_processes_admit_exactly_as_many_as_the_limit_says",
        "unit/test_limiter.py::test_a_large_limit_is_leased_and_never_passed",
        "e2e/test_budget_processes.py::test_four_processes_never_spend_more_than_the_budget",
    ),
    "P-5": (
        GATEWAY_TOOLS + "test_http_tools_cannot_reach_inside",
        "unit/test_tool_network.py::test_the_guard_connects_to_the_address_it_judged",
        CREDENTIALS + "test_every_kind_of_header_is_there_by_its_name",
    ),
    "P-11": (
        WORKERS + "test_sigterm_with_ten_live_streams",
        "e2e/test_shutdown.py::test_sigterm_tells_the_streams_that_do_not_end_and_goes",
    ),
    "P-15": (
        "test_packaging.py::test_the_sbom_is_valid_and_names_every_locked_package",
        "test_operations.py::test_the_sbom_has_the_locks_hashes_and_says_which_are_missing",
        AUDIT + "test_packages_are_asked_about_all_of_them",
        AUDIT + "test_what_is_installed_is_compared_with_the_lock",
        AUDIT + "test_a_service_that_does_not_answer_is_a_failure_that_says_how_many",
    ),
    "P-8": (FAULTS + "test_an_endless_line_is_cut_and_memory_stays",),
    "P-10": (
        LOGS + "test_no_secret_and_no_prompt_is_in_the_log",
        "e2e/test_canary.py::test_no_mark_is_left_anywhere",
        "e2e/test_traces.py::test_nothing_that_people_wrote_is_in_a_trace_unless_asked_for",
        "unit/test_explain.py::test_no_password_is_in_what_settings_say_and_no_number_is_hidden",
        WORKERS + "test_the_command_line_reaches_a_gateway_with_tls_and_shows_no_key_to_a_stranger",
    ),
}
"""Promise → the tests that prove it."""


def _ids(prefix: str, *numbers: int, digits: int = 2) -> frozenset[str]:
    return frozenset(f"{prefix}-{number:0{digits}}" for number in numbers)


STILL_MISSING: dict[str, str] = {
    "A-10": "providers, enforcement: primitives and policies; teams, governance, audit, "
    "metadata_denylists: with those capabilities",
    "A-114": "metrics of teams, audit, knowledge, versions: with those capabilities",
    "AC-18": "no run has checkpoints yet, and there is no audit trail",
}
"""Of promises in `PROVED` that are kept in part: what is missing, and with what it comes."""

NOT_YET_BUILT: dict[str, frozenset[str]] = {
    "durable runs, memory, teams, policies": _ids(
        "A",
        *range(4, 8),
        *range(20, 22),
        *range(23, 31),
        *range(40, 52),
        *range(60, 65),
        *range(66, 73),
        *range(80, 89),
        *range(90, 103),
        *range(110, 114),
        *range(115, 121),
    ),
    "the agent runtime": _ids("R", *range(1, 18)),
    "the workforce backend": _ids(
        "U",
        *range(10, 14),
        *range(20, 26),
        *range(30, 35),
        *range(40, 42),
        *range(60, 62),
        *range(63, 68),
    ),
    "tasks and orchestration": _ids("T", *range(1, 9), *range(10, 26)),
    "acceptance scenarios of later capabilities": _ids("AC", 8, *range(10, 17), 19, digits=1),
    "defects to avoid in later capabilities": _ids("W", 10, 11, *range(13, 16), 18, *range(20, 27)),
    "guarantees of later capabilities": _ids("P", 12, 14, digits=1),
}
"""What is promised and not built, by the capability it belongs to."""
