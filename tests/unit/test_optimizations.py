"""The ladder as data."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import pytest

from qwen2_npu.errors import UnsupportedError
from qwen2_npu.optimizations import (
    ALTERNATIVES,
    DESCRIPTIONS,
    EXPERTS,
    LADDER,
    PARALLEL,
    QUANTIZED,
    QUANTIZED_VARIANTS,
    REQUIRES,
    VARIANTS,
    Optimizations,
)

SWITCHES = LADDER + EXPERTS + PARALLEL + QUANTIZED + VARIANTS + QUANTIZED_VARIANTS


def test_presets_are_cumulative():
    for count, step in enumerate(LADDER, start=1):
        assert Optimizations.up_to(step).names() == LADDER[:count]
    assert Optimizations.none().names() == ()
    assert Optimizations.all().names() == LADDER + EXPERTS
    assert Optimizations.up_to(PARALLEL[-1]).names() == LADDER + EXPERTS + PARALLEL


@pytest.mark.parametrize(("kind", "steps"), [("qwen2", LADDER), ("qwen2_moe", LADDER + EXPERTS)])
def test_a_dense_model_has_no_steps_of_experts(kind, steps):
    config = SimpleNamespace(model_type=kind)
    assert Optimizations.all().of_model(config).names() == steps
    assert Optimizations.none().of_model(config) == Optimizations.none()


def test_pairs_of_which_one_can_be_on():
    wanted = {("w8a16", "w8a8"), ("mm_all_reduce", "w8a16"), ("mm_all_reduce", "w8a8")}
    assert set(ALTERNATIVES) == wanted
    for pair in wanted:
        with pytest.raises(ValueError, match=f"{pair[0]} and {pair[1]} cannot both be on; switch one of them off"):
            Optimizations.of(pair, with_requirements=True)


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_8_bit_weights_come_after_the_ladder(scheme):
    assert Optimizations.up_to(scheme) == Optimizations.all().replace(**{scheme: True})
    assert Optimizations.only(scheme).names() == (scheme,)
    assert Optimizations.up_to(scheme).scheme == scheme
    assert Optimizations.all().scheme is None


def test_8_bit_weights_where_the_checkpoint_has_them():
    dense = SimpleNamespace(model_type="qwen2")
    for scheme in QUANTIZED:
        assert Optimizations.for_model(None, dense, scheme).names() == (*LADDER, scheme)
        assert Optimizations.for_model(Optimizations.none(), dense, scheme) == Optimizations.none()
        assert Optimizations.for_model(Optimizations.all(), dense, scheme).scheme is None
        with pytest.raises(UnsupportedError, match=rf"{scheme}: the weights .* not quantised; .* --scheme {scheme}"):
            Optimizations.for_model(Optimizations.up_to(scheme), dense)
        mixture = SimpleNamespace(model_type="qwen2_moe")
        for given in (None, Optimizations.only(scheme)):
            with pytest.raises(UnsupportedError, match=rf"{scheme}: a mixture .*=Optimizations\.all\(\)"):
                Optimizations.for_model(given, mixture, scheme)
        assert Optimizations.for_model(Optimizations.all(), mixture, scheme) == Optimizations.all()
    assert Optimizations.for_model(None, dense).names() == LADDER
    assert Optimizations.for_model(Optimizations.only("w8a16"), dense, "w8a8").scheme == "w8a16"
    with pytest.raises(UnsupportedError, match=r"w8a8: .* quantised for w8a16, .* --scheme w8a8, or use w8a16"):
        Optimizations.for_model(Optimizations.only("w8a8"), dense, "w8a16")


def test_only_adds_what_a_step_needs_and_nothing_else():
    assert Optimizations.only("add_rms_norm").names() == ("add_rms_norm",)
    assert Optimizations.only("ifa_tiling").names() == ("fixed_kv_cache", "flash_attention", "ifa_tiling")


@pytest.mark.parametrize(("step", "needed"), [(s, n) for s, needs in REQUIRES.items() for n in needs])
def test_impossible_combinations_raise(step, needed):
    switched = dict.fromkeys(Optimizations.only(step).names(), True) | {needed: False}
    with pytest.raises(ValueError, match=f"needs {needed}"):
        Optimizations(**switched)


def test_every_combination_is_possible_or_names_what_it_needs():
    for values in itertools.product([False, True], repeat=len(SWITCHES)):
        switched = dict(zip(SWITCHES, values, strict=True))
        complete = all(switched[n] for s, needs in REQUIRES.items() if switched[s] for n in needs)
        if complete and not any(all(switched[name] for name in pair) for pair in ALTERNATIVES):
            assert set(Optimizations(**switched).names()) == {name for name, on in switched.items() if on}
        else:
            with pytest.raises(ValueError, match="cannot both be on" if complete else "needs"):
                Optimizations(**switched)


def test_every_switch_is_described_and_frozen():
    fields = {field.name for field in dataclasses.fields(Optimizations)}
    assert fields == set(SWITCHES) == set(DESCRIPTIONS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Optimizations.all().swiglu = False  # type: ignore[misc]


@pytest.mark.parametrize("call", [Optimizations.up_to, Optimizations.only])
def test_unknown_names_raise_with_the_known_ones(call):
    with pytest.raises(ValueError, match=r"'flash'.*flash_attention"):
        call("flash")


def test_only_bools():
    with pytest.raises(ValueError, match="swiglu='yes'"):
        Optimizations(swiglu="yes")  # type: ignore[arg-type]
