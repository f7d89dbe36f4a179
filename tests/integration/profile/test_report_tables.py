"""Tables on the terminal: the figures of the meters, and names as they are."""

import io

import pytest
from rich.console import Console

from ms_profile import report
from support.traces import comm_record, flops_record, memory_record


@pytest.fixture
def screen():
    return Console(file=io.StringIO(), width=160, force_terminal=False)


def lines(console):
    """The cells of each line of the tables."""
    shown = console.file.getvalue()
    return [
        [cell.strip() for cell in line.strip("│┃ \n").replace("┃", "│").split("│")]
        for line in shown.splitlines()
    ]


def test_flops(screen):
    report.print_flops(flops_record(), console=screen)
    found = lines(screen)
    assert ["module", "forward", "backward", "sum", "share"] in found
    assert ["mlp", "100 FLOP", "200 FLOP", "300 FLOP", "99.7 %"] in found
    assert ["all", "101 FLOP", "200 FLOP", "301 FLOP", "100.0 %"] in found


def test_communication_of_all_ranks(screen):
    report.print_communication([comm_record(0), comm_record(1)], console=screen)
    assert ["dp", "all_reduce", "6", "96 B", "48 B"] in lines(screen)
    assert "communication of 2 ranks" in screen.file.getvalue()


def test_memory(screen):
    record = {
        **memory_record(),
        "by_module": {"mlp": {"made": 4096, "saved": 96}, "": {"made": 1, "saved": 0}},
    }
    report.print_memory(record, console=screen)
    found = lines(screen)
    assert ["memory: peak 96 B in mlp, forward, aten.mm"] in found
    assert ["module", "made", "saved"] in found
    assert ["mlp", "4 KiB", "96 B"] in found
    assert ["(no module)", "1 B", "0 B"] in found


def test_names_are_shown_as_they_are(screen):
    record = flops_record()
    record["by_module"] = {"[red]evil[/red]\x1b[2J\x07": {"forward": 101, "backward": 200}}
    report.print_flops(record, console=screen)
    shown = screen.file.getvalue()
    assert "[red]evil[/red]\\x1b[2J\\x07" in shown
    assert "\x1b" not in shown
    assert "\x07" not in shown


def test_large_numbers_have_units():
    from ms_profile.report import units

    assert [units.size(n) for n in (0, 1023, 1024, 1536, 10**12)] == [
        "0 B",
        "1023 B",
        "1 KiB",
        "1.5 KiB",
        "931 GiB",
    ]
    assert [units.flops(n) for n in (999, 14_476_640_256)] == ["999 FLOP", "14.5 GFLOP"]
    assert [units.duration(s) for s in (0, 2.5e-7, 1e-3, 0.5, 90)] == [
        "0 us",
        "0.25 us",
        "1 ms",
        "500 ms",
        "90 s",
    ]
    assert units.change(4, 5) == "+25.0 %"
    assert units.change(0, 5) == ""
