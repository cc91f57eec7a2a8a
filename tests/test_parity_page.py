"""docs/parity.md and docs/demonstrations.md: nothing is left out, and every test that they name is there."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"
DOES_NOT_APPLY = "does not apply"
# The column of what asyncio programs do.  Where something does not apply at all, there is nothing in it.
THROUGH, NOTHING = "through `aio`", "-"

# The tests of distributed 2026.8 for its servers, comms, batched streams and task groups, by file.
THEIRS = {
    "tests/test_core.py": """
        test_server_status_is_always_enum test_server_assign_assign_enum_is_quiet test_server_status_compare_enum_is_quiet
        test_server_close_stops_gil_monitoring test_server test_server_raises_on_blocked_handlers test_server_listen
        test_rpc_default test_rpc_tcp test_rpc_tls test_rpc_inproc test_rpc_inputs test_rpc_message_lifetime_default
        test_rpc_message_lifetime_tcp test_rpc_message_lifetime_inproc test_rpc_with_many_connections_tcp
        test_rpc_with_many_connections_inproc test_large_packets_tcp test_large_packets_inproc test_identity_tcp
        test_identity_inproc test_ports test_errors test_connect_raises test_send_recv_args test_send_recv_cancelled
        test_coerce_to_address test_connection_pool test_connection_pool_close_while_connecting
        test_connection_pool_outside_cancellation test_connection_pool_catch_all_cancellederrors
        test_remove_cancels_connect_attempts test_remove_cancels_connect_before_task_running
        test_connection_pool_respects_limit test_connection_pool_tls test_connection_pool_remove test_counters test_ticks
        test_tick_logging test_compression test_rpc_serialization test_rpc_closed_exception test_thread_id
        test_deserialize_error test_connection_pool_detects_remote_close test_close_properly test_server_redundant_kwarg
        test_server_comms_mark_active_handlers test_server_sys_path_local_directory_cleanup
        test_close_fast_without_active_handlers test_close_grace_period_for_handlers test_expects_comm
        test_messages_are_ordered_bsend test_messages_are_ordered_raw test_large_payload
    """,
    "comm/tests/test_comms.py": """
        test_parse_host_port test_unparse_host_port test_get_address_host test_resolve_address test_get_local_address_for
        test_tcp_listener_does_not_call_handler_on_handshake_error test_tcp_specific test_tls_specific
        test_comm_failure_threading test_inproc_specific_same_thread test_inproc_specific_different_threads
        test_inproc_continues_listening_after_handshake_error test_inproc_handshakes_concurrently
        test_default_client_server_ipv4 test_default_client_server_ipv6 test_tcp_client_server_ipv4
        test_tcp_client_server_ipv6 test_tls_client_server_ipv4 test_tls_client_server_ipv6 test_inproc_client_server
        test_tls_reject_certificate test_tcp_comm_closed_implicit test_tls_comm_closed_implicit
        test_inproc_comm_closed_implicit test_tcp_comm_closed_explicit test_tls_comm_closed_explicit
        test_inproc_comm_closed_explicit test_inproc_comm_closed_explicit_2 test_comm_closed_on_write_error
        test_comm_closed_on_read_error test_retry_connect test_handshake_slow_comm test_stop_listener_during_handle_stream
        test_tcp_connect_timeout test_inproc_connect_timeout test_tcp_many_listeners test_inproc_many_listeners
        test_tcp_deserialize test_inproc_deserialize test_inproc_deserialize_roundtrip test_tcp_deserialize_roundtrip
        test_tcp_deserialize_eoferror test_tcp_repr test_tls_repr test_inproc_repr test_tcp_addresses
        test_get_stream_address_raises_if_closed test_tls_addresses test_inproc_addresses test_register_backend_entrypoint
        test_do_not_share_buffers test_share_buffer_with_header
    """,
    "comm/tests/test_tcp.py": """
        test_getaddrinfo_invalid_af
    """,
    "comm/tests/test_ws.py": """
        test_registered test_listen_connect test_listen_connect_wss test_expect_ssl_context
        test_expect_scheduler_ssl_when_sharing_server test_roundtrip test_collections test_large_transfer
        test_http_and_comm_server test_connection_made_with_extra_conn_args test_connection_made_with_sni test_quiet_close
        test_ws_roundtrip test_wss_roundtrip
    """,
    "tests/test_batched.py": """
        test_BatchedSend test_send_before_start test_send_after_stream_start test_send_before_close test_close_closed
        test_close_not_started test_close_twice test_stress test_sending_traffic_jam test_large_traffic_jam test_serializers
    """,
    "tests/test_async_task_group.py": """
        test_async_task_group_initialization test_async_task_group_call_soon_executes_task_in_background
        test_async_task_group_call_later_executes_delayed_task_in_background test_async_task_group_close_closes
        test_async_task_group_close_does_not_cancel_existing_tasks test_async_task_group_close_prohibits_new_tasks
        test_async_task_group_stop_disallows_shutdown test_async_task_group_stop_cancels_long_running
    """,
}
# What was seen of it in runs.
DEMONSTRATIONS = [f"D{number:02d}" for number in range(1, 42)]

Row = dict[str, str]


def tables(page: str) -> Iterator[tuple[str, Row]]:
    """The rows of a page's tables, each as (its section, its cells by the names of their columns)."""
    section, header = "", None
    for line in (DOCS / page).read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            section = line.strip("# `")
        if not line.startswith("|"):
            header = None
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if header is None:
            header = cells
        elif not set(line) <= set("|-: "):
            assert len(cells) == len(header), f"{page}: a row of {len(cells)} cells under {len(header)} columns: {line}"
            yield section, dict(zip(header, cells, strict=True))


@functools.cache
def ours(file: str) -> frozenset[str]:
    """The tests of a file below tests/, as pytest names them."""
    path = TESTS / file
    if not path.is_file():
        return frozenset()
    found = set()
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, functions):
            found.add(node.name)
        elif isinstance(node, ast.ClassDef):
            found |= {f"{node.name}::{each.name}" for each in node.body if isinstance(each, functions)}
    return frozenset(name for name in found if name.rpartition("::")[2].startswith("test_"))


def named(cell: str) -> list[str]:
    """The tests that a cell names."""
    return re.findall(r"`([\w/.]+\.py::[\w:]+)`", cell)


def problems(cell: str) -> list[str]:
    """What of a cell is not so: it names tests that exist, or says why there is nothing to test."""
    found = []
    tests = named(cell)
    for test in tests:
        file, _, name = test.partition("::")
        if name not in ours(file):
            found.append(f"there is no {test}")
    if len(tests) != len(set(tests)):
        found.append("a test is named twice")
    if cell.startswith(DOES_NOT_APPLY):
        if len(re.sub(r"`[^`]*`", "", cell.removeprefix(DOES_NOT_APPLY)).split()) < 6:
            found.append("no reason is given why it does not apply")
    elif not tests:
        found.append("no test is named")
    return found


PARITY = [(section, row) for section, row in tables("parity.md") if "test" in row]
SEEN = [row for _, row in tables("demonstrations.md") if "id" in row]


def checked(row: Row, plain: tuple[str, ...]) -> dict[str, list[str]]:
    """The problems of each column of a row but the plain ones."""
    return {column: found for column, cell in row.items() if column not in plain and (found := problems(cell))}


def test_no_test_of_theirs_is_missing() -> None:
    listed: dict[str, list[str]] = {}
    for section, row in PARITY:
        listed.setdefault(section, []).append(row["test"].strip("`"))
    assert listed == {file: names.split() for file, names in THEIRS.items()}
    assert sum(map(len, listed.values())) == 141


@pytest.mark.parametrize(("section", "row"), PARITY, ids=[f"{row['test'].strip('`')}" for _, row in PARITY])
def test_a_test_of_theirs_is_shown(section: str, row: Row) -> None:
    assert "here" in row
    assert row["what it asserts"]
    plain = ["test", "what it asserts"]
    if row["here"].startswith(DOES_NOT_APPLY):
        assert row[THROUGH] == NOTHING
        plain.append(THROUGH)
    assert checked(row, tuple(plain)) == {}
    assert all(test.startswith("aio/test_scenarios_") for test in named(row[THROUGH]))


def test_the_counts() -> None:
    counts = {row["tests of"].strip("`"): row for _, row in tables("parity.md") if "tests of" in row}
    assert list(counts) == [*THEIRS, "all"]
    for file, row in counts.items():
        cells = [each["here"] for section, each in PARITY if file in (section, "all")]
        apart = sum(cell.startswith(DOES_NOT_APPLY) for cell in cells)
        through = sum(bool(named(each[THROUGH])) for section, each in PARITY if file in (section, "all"))
        assert (row["there"], row["shown here"], row["does not apply"], row[f"shown {THROUGH}"]) == (
            str(len(cells)),
            str(len(cells) - apart),
            str(apart),
            str(through),
        ), file
    said = (DOCS / "parity.md").read_text(encoding="utf-8")
    assert f"{counts['all'][f'shown {THROUGH}']} of the {counts['all']['shown here']} that apply" in said


def test_no_demonstration_is_missing() -> None:
    assert [row["id"] for row in SEEN] == DEMONSTRATIONS


@pytest.mark.parametrize("row", SEEN, ids=[row["id"] for row in SEEN])
def test_a_demonstration_is_shown(row: Row) -> None:
    assert all(row[column] for column in ("what is done", "stock", "here"))
    assert checked(row, ("id", "what is done", "stock", "here")) == {}
    assert named(row["tests"])


def test_tests_that_bear_the_id_of_a_demonstration_are_in_its_row() -> None:
    file = "parity/test_demonstrations.py"
    for name in ours(file):
        (row,) = [row for row in SEEN if name.startswith(f"test_{row['id'].lower()}_")]
        assert f"{file}::{name}" in named(row["tests"])


def test_the_tests_for_parity_are_named() -> None:
    """None was written for nothing."""
    cells = " ".join(cell for row in [*(row for _, row in PARITY), *SEEN] for cell in row.values())
    for file in sorted([*TESTS.glob("parity/test_*.py"), *TESTS.glob("aio/test_scenarios_*.py")]):
        place = f"{file.parent.name}/{file.name}"
        assert {name for name in ours(place) if f"`{place}::{name}`" not in cells} == set()


def test_a_wrong_cell_is_noticed() -> None:
    good = "`test_parity_page.py::test_a_wrong_cell_is_noticed`"
    assert problems(good) == problems(f"{good} With a remark.") == []
    assert problems(f"{DOES_NOT_APPLY}: it is about something that there is not") == []
    wrong = {
        "shown": "no test is named",
        "`test_parity_page.py::test_that_is_not_there`": "there is no",
        "`test_parity_page.py::problems`": "there is no",
        "`no_such_file.py::test_x`": "there is no",
        f"{good} {good}": "a test is named twice",
        DOES_NOT_APPLY: "no reason",
        f"{DOES_NOT_APPLY}: {good}": "no reason",
        "": "no test is named",
    }
    for cell, what in wrong.items():
        assert any(problem.startswith(what) for problem in problems(cell)), cell
