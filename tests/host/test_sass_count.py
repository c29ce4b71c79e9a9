"""Counts of warp instructions from machine code: bench/machine/sass_warp.py on code written by hand."""

from __future__ import annotations

import numpy as np
import pytest

from bench.machine import sass_text, sass_warp

# A loop of as many turns as the first argument says; lanes from 8 on skip an addition; a store.
CODE = """
.text.loop:
\t//## File "/a.cu", line 7 inlined at "/a.cu", line 9
\t//## File "/a.cu", line 9
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   MOV R1, RZ ;
        /*0020*/                   ISETP.GE.AND P0, PT, R0, 0x8, PT ;
.L_x_1:
        /*0030*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0040*/               @P0 BRA `(.L_x_2) ;
        /*0050*/                   IMAD R2, R1.reuse, R1, R2 ;
.L_x_2:
        /*0060*/                   ISETP.LT.AND P1, PT, R1, c[0x0][0x210], PT ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
        /*0080*/                   STG.E desc[UR4][R4.64], R2 ;
        /*0090*/                   EXIT ;
"""


def counts(code: str, turns: int, warp: int = 0) -> dict[int, int]:
    program = sass_text.programs(code)["loop"]
    constants = bytes(0x210) + turns.to_bytes(4, "little") + bytes(64)
    found = sass_warp.Warp(program, constants, 0, warp, 64).run()
    return {one.address: times for one, times in found.items()}


@pytest.mark.parametrize("turns", [1, 5])
def test_loops_and_lanes_that_part(turns: int) -> None:
    found = counts(CODE, turns)
    assert found == {0: 1, 0x10: 1, 0x20: 1, **dict.fromkeys((0x30, 0x40, 0x50, 0x60, 0x70), turns), 0x80: 1, 0x90: 1}
    assert 0x50 not in counts(CODE, turns, warp=1)  # whose lanes all skip it


def test_a_branch_on_what_was_loaded_is_an_error() -> None:
    with pytest.raises(sass_warp.Unknown):
        counts(CODE.replace("MOV R1, RZ", "LDG.E R1, desc[UR4][R4.64]"), 3)


def test_a_vote_for_any_lane_on_what_was_loaded_finds_none() -> None:
    """Kernels leave for their rare paths by it."""
    code = CODE.replace("MOV R1, RZ", "LDG.E R3, desc[UR4][R4.64]").replace(
        "ISETP.GE.AND P0, PT, R0, 0x8, PT", "ISETP.GE.AND P2, PT, R3, 0x8, PT"
    )
    code = code.replace("IMAD R2, R1.reuse, R1, R2", "VOTE.ANY P0, P2").replace("@P0 BRA", "@!P0 BRA")
    assert counts(code, 1)[0x80] == 1


@pytest.mark.parametrize(("kind", "times"), [("CONV", 0), ("DIV", 1)])
def test_lanes_meet_before_operations_of_a_warp(kind: str, times: int) -> None:
    """A branch of those that have met is taken, one of those that have not isn't."""
    assert counts(CODE.replace("@P0 BRA `", f"BRA.{kind} ~URZ, `"), 1).get(0x50, 0) == times


def test_the_source_lines_of_an_instruction() -> None:
    program = sass_text.programs(CODE)["loop"]
    assert program.instructions[0].place == ("/a.cu:9", "/a.cu:7")


def test_arithmetic_follows_the_machine() -> None:
    """Products of 64 bits, carries, shifts, logic, constants of two halves, floats of 64 bits and back."""
    for text in (
        "IMAD.WIDE.U32 R6, R3, 0x10000, RZ ;LEA.HI R1, R6, R7, RZ, 0x1 ;",
        "SHF.R.S32.HI R1, RZ, 0x1f, R3 ;LOP3.LUT R1, R1, 0x2, RZ, 0xc0, !PT ;",
        "IADD3 R6, P2, R3, R3, RZ ;IMAD.X R1, RZ, RZ, 0x1, P2 ;",
        "HFMA2.MMA R1, -RZ, RZ, 0, 5.9604644775390625e-08 ;MOV R5, R1 ;",
        "I2F.U64.RP R6, R2 ;F2I.U64.TRUNC R0, R6 ;",
    ):
        lines = [
            f"        /*{0x1000 + 16 * i:04x}*/                   {part} ;"
            for i, part in enumerate(text.split(" ;")[:-1])
        ]
        program = sass_text.programs("\n".join([".text.a:", *lines, "        /*1020*/                   EXIT ;"]))["a"]
        warp = sass_warp.Warp(program, bytes(1024), 0, 0, 32)
        warp.values["R3"], warp.known["R3"] = np.full(32, 0x80000000, np.uint64), np.ones(32, bool)
        warp.run()
        name = text.split(".")[0].split(" ")[0]
        expected = {"IMAD": 0x8000, "SHF": 2, "IADD3": 2, "HFMA2": 1, "I2F": 0x80000000}[name]
        assert (warp.values["R1"] == expected).all(), text


def test_a_half_of_what_was_loaded_can_be_known() -> None:
    """As where a bool is put into the low half of a register and read from there."""
    for selector, known in (("0x9910", True), ("0xbb32", False)):
        lines = ["PRMT R3, RZ, 0x7610, R3", f"PRMT R1, R3, {selector}, RZ", "EXIT"]
        placed = [f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines)]
        program = sass_text.programs("\n".join([".text.a:", *placed]))["a"]
        warp = sass_warp.Warp(program, bytes(1024), 0, 0, 32)
        warp.known["R3"] = np.zeros(32, bool)
        warp.run()
        assert (warp.known["R1"] == known).all()


def test_the_longest_chain_from_barrier_to_barrier() -> None:
    """Of three warps two meet among themselves first, which the third one is not waited for in."""
    meet = [sass_warp.Meeting("0x1", 5), sass_warp.Meeting("0x0", 3), sass_warp.Meeting(sass_warp.END, 2)]
    late = [sass_warp.Meeting("0x1", 7), sass_warp.Meeting("0x0", 1), sass_warp.Meeting(sass_warp.END, 2)]
    alone = [sass_warp.Meeting("0x0", 9), sass_warp.Meeting(sass_warp.END, 4)]
    assert sass_warp.chain([meet, late, alone]) == 7 + 3 + 4
    assert sass_warp.chain([meet, late, [sass_warp.Meeting("0x0", 20), sass_warp.Meeting(sass_warp.END, 0)]]) == 20 + 2
    assert sass_warp.chain([[sass_warp.Meeting(sass_warp.END, 6)]]) == 6


def test_where_a_warp_meets_others() -> None:
    """A barrier that its predicate leaves out is none."""
    code = CODE.replace("IMAD R2, R1.reuse, R1, R2", "BAR.SYNC.DEFER_BLOCKING 0x1, R5")
    code = code.replace("STG.E desc[UR4][R4.64], R2", "@!P0 BAR.SYNC.DEFER_BLOCKING 0x0")
    program = sass_text.programs(code)["loop"]
    constants = bytes(0x210) + (2).to_bytes(4, "little") + bytes(64)
    warps = [sass_warp.Warp(program, constants, 0, warp, 64) for warp in range(2)]
    for warp in warps:
        warp.run()
    assert warps[0].meetings == [("0x1", 6), ("0x1", 5), ("0x0", 3), ("", 1)]
    assert warps[1].meetings == [("", 13)]  # all lanes leave the loop's barrier out
