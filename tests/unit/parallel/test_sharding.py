"""What every rank holds, for the head layouts of all sizes and every number of ranks that they can be cut for."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import Qwen2Config

from qwen2_npu import Optimizations, Qwen2ForCausalLM
from qwen2_npu.checkpoint.experts import one_by_one
from qwen2_npu.checkpoint.sources import part_of
from qwen2_npu.checkpoint.weights import held_shapes, stock_layout, stock_shapes
from qwen2_npu.compat import CONFIGURATIONS, head_dim, kv_head_count
from qwen2_npu.conformance.accuracy.stock import uninitialised
from qwen2_npu.conformance.sizes import SIZES, Size
from qwen2_npu.errors import UnsupportedError
from qwen2_npu.parallel.collectives import Ranks
from qwen2_npu.parallel.sharding import CUTS, LARGEST, Shard, Slice, admissible_sizes, ending
from tests.unit.small import small_config

MIXTURE = "57B-A14B"
"""28 query heads, 4 kv heads, and 64 experts of 2560 columns beside one of 20480."""

DENSE = {name: size for name, size in SIZES.items() if size.whole is None and name != MIXTURE}

POSSIBLE = {"0.5B": (1, 2), "1.5B": (1, 2, 4), "7B": (1, 2, 4), "72B": (1, 2, 4, 8)}
"""Worked out by hand: ranks divide the query heads (14, 12, 28, 64) and the columns, and divide the kv heads
(2, 2, 4, 8) or are a multiple of them."""

OF_EXPERTS: dict[str, tuple[int, ...]] = {MIXTURE: (1, 2, 4)} if "qwen2_moe" in CONFIGURATIONS else {}

DENSE_LAYOUT = pytest.mark.parametrize(
    ("name", "ranks"), [(name, ranks) for name, every in POSSIBLE.items() for ranks in every]
)

EVERY_LAYOUT = pytest.mark.parametrize(
    ("name", "ranks"), [(name, ranks) for name, every in (POSSIBLE | OF_EXPERTS).items() for ranks in every]
)


def config_of(name: str, **changes: Any) -> Qwen2Config:
    """The real head counts; what only decides how much there is to hold is small."""
    if name == MIXTURE:
        return mixture(**changes)
    size = DENSE[name]
    values = {
        "num_attention_heads": size.heads, "num_key_value_heads": size.kv_heads, "head_dim": 4,
        "hidden_size": 4 * size.heads, "intermediate_size": 16, "vocab_size": 48, "num_hidden_layers": 1,
        "tie_word_embeddings": size.tied,
    }  # fmt: skip
    return small_config(**(values | changes))


def mixture(**changes: Any) -> Any:
    """Two layers, of which one has experts."""
    values = {
        "num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 112, "intermediate_size": 24,
        "vocab_size": 48, "num_hidden_layers": 2, "mlp_only_layers": [1], "num_experts": 3, "num_experts_per_tok": 2,
        "moe_intermediate_size": 8, "shared_expert_intermediate_size": 16, "pad_token_id": 0,
    }  # fmt: skip
    return CONFIGURATIONS["qwen2_moe"](**(values | changes))


def numbered(config: Qwen2Config) -> dict[str, torch.Tensor]:
    """Stock tensors in which no value stands twice."""
    tensors, start = {}, 0
    for name, shape in stock_shapes(config).items():
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(start, start + count).view(shape)
        start += count
    return tensors


def parts(config: Qwen2Config, name: str, tensor: torch.Tensor, ranks: int) -> list[torch.Tensor]:
    return [part_of(tensor, Shard(rank, ranks).slice_of(name, config)) for rank in range(ranks)]


# ---- which numbers of ranks ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", DENSE)
def test_numbers_of_ranks_of_the_real_sizes(name: str) -> None:
    assert admissible_sizes(DENSE[name].config()) == POSSIBLE[name]


@DENSE_LAYOUT
def test_small_layouts_are_cut_as_the_real_ones(name: str, ranks: int) -> None:
    Shard(0, ranks).check(DENSE[name].config())
    Shard(0, ranks).check(config_of(name))


@pytest.mark.parametrize("name", DENSE)
def test_other_numbers_are_refused_with_the_head_counts(name: str) -> None:
    config, size = DENSE[name].config(), DENSE[name]
    possible = re.escape(", ".join(map(str, POSSIBLE[name])))
    for ranks in set(range(1, 2 * LARGEST + 1)) - set(POSSIBLE[name]):
        said = rf"tp_size={ranks}: .*{size.heads} query heads and {size.kv_heads} kv heads.* cut for {possible}$"
        with pytest.raises(UnsupportedError, match=said):
            Shard(0, ranks).check(config)


@pytest.mark.parametrize(
    ("changes", "ranks", "said"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, 4, "4 ranks do not divide 6"),
        ({"num_attention_heads": 12, "num_key_value_heads": 3}, 2, "neither do 2 ranks divide 3"),
        ({"num_attention_heads": 12, "num_key_value_heads": 4}, 6, "neither do 6 ranks divide 4"),
        ({"intermediate_size": 90}, 4, "intermediate_size=90, which 4 ranks do not divide"),
        ({"num_attention_heads": 16, "num_key_value_heads": 16}, 16, "at most 8 cards"),
    ],
)
def test_every_reason_is_named(changes: dict[str, int], ranks: int, said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        Shard(0, ranks).check(small_config(head_dim=4, **changes))


@pytest.mark.parametrize(
    ("rank", "size", "said"),
    [
        (0, 0, "tp_size=0 must be a positive integer"),
        (0, -2, "tp_size=-2"),
        (0, True, "tp_size=True"),
        (0, 2.0, "tp_size=2.0"),
        (0, "2", "tp_size='2'"),
        (2, 2, "tp_rank=2 must be an integer from 0 to 1"),
        (-1, 2, "tp_rank=-1"),
        (True, 2, "tp_rank=True"),
        (None, 1, "tp_rank=None"),
    ],
)
def test_no_such_rank(rank: Any, size: Any, said: str) -> None:
    with pytest.raises(UnsupportedError, match=re.escape(said)):
        Shard(rank, size)


# ---- the parts are the whole -----------------------------------------------------------------------------------------
@EVERY_LAYOUT
def test_parts_of_all_ranks_are_the_whole(name: str, ranks: int) -> None:
    """Side by side, in the order of the ranks; a kv head that several ranks hold counts once."""
    config = config_of(name)
    for tensor_name, tensor in numbered(config).items():
        held = parts(config, tensor_name, tensor, ranks)
        cut = Shard(0, ranks).slice_of(tensor_name, config)
        if cut is None:
            assert all(torch.equal(part, tensor) for part in held), tensor_name
            continue
        replicas = 1
        if tensor_name.split(".")[-2] in ("k_proj", "v_proj"):
            replicas = max(1, ranks // kv_head_count(config))
            for first in range(0, ranks, replicas):
                assert all(torch.equal(held[first], part) for part in held[first : first + replicas]), tensor_name
        assert torch.equal(torch.cat(held[::replicas], dim=cut.axis), tensor), tensor_name


@EVERY_LAYOUT
def test_only_norms_and_what_cannot_be_cut_are_held_by_all(name: str, ranks: int) -> None:
    if ranks == 1:
        return
    config = config_of(name)
    whole = {each for each in stock_shapes(config) if Shard(0, ranks).slice_of(each, config) is None}
    gates = {f"model.layers.0.mlp.{gate}.weight" for gate in ("gate", "shared_expert_gate")}
    assert {each for each in whole if "norm" not in each} == (gates if name == MIXTURE else set())


@EVERY_LAYOUT
def test_query_heads_meet_their_kv_head(name: str, ranks: int) -> None:
    """Query head h of the whole model reads kv head h // (N / K); on a rank, local head l reads local l // (n / k)."""
    config = config_of(name)
    group = config.num_attention_heads // kv_head_count(config)
    for rank in range(ranks):
        shard = Shard(rank, ranks)
        queries, keys = shard.part("query heads", config), shard.part("kv heads", config)
        local_group = len(queries) // len(keys)
        assert len(queries) % len(keys) == 0
        assert [keys[local // local_group] for local in range(len(queries))] == [head // group for head in queries]


@EVERY_LAYOUT
def test_heads_are_never_torn(name: str, ranks: int) -> None:
    config = config_of(name)
    for tensor_name in stock_shapes(config):
        found = Shard(ranks - 1, ranks).slice_of(tensor_name, config)
        if found is not None and tensor_name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert found.start % head_dim(config) == 0
            assert found.stop % head_dim(config) == 0


@pytest.mark.parametrize("vocab_size", [49, 50, 51])
def test_a_vocabulary_that_ranks_do_not_divide_is_held_whole(vocab_size: int) -> None:
    config = config_of("7B", vocab_size=vocab_size)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert Shard(1, 4).slice_of(name, config) is None
        assert Shard(1, 4).shape_of(name, (vocab_size, 7), config) == (vocab_size, 7)


def test_one_rank_holds_everything() -> None:
    config = config_of("0.5B")
    assert all(Shard().slice_of(name, config) is None for name in stock_shapes(config))


def test_a_slice_of_the_72b_by_hand() -> None:
    config = DENSE["72B"].config()
    shard = Shard(3, 8)
    assert shard.slice_of("model.layers.0.self_attn.q_proj.weight", config) == Slice(0, 3072, 4096)
    assert shard.slice_of("model.layers.0.self_attn.k_proj.bias", config) == Slice(0, 384, 512)
    assert shard.slice_of("model.layers.0.self_attn.o_proj.weight", config) == Slice(1, 3072, 4096)
    assert shard.slice_of("model.layers.0.mlp.down_proj.weight", config) == Slice(1, 11088, 14784)
    assert shard.slice_of("lm_head.weight", config) == Slice(0, 57024, 76032)


def test_the_two_kv_heads_of_the_1_5b_on_four_ranks() -> None:
    config = DENSE["1.5B"].config()
    assert [Shard(rank, 4).part("kv heads", config) for rank in range(4)] == [
        range(1),
        range(1),
        range(1, 2),
        range(1, 2),
    ]


# ---- modules, sizes and the stock model agree with it ----------------------------------------------------------------
@EVERY_LAYOUT
@pytest.mark.parametrize("optimizations", [Optimizations.none(), Optimizations.all()], ids=["none", "all"])
def test_modules_have_the_shapes_of_the_slices(name: str, ranks: int, optimizations: Optimizations) -> None:
    config = config_of(name)
    shard = Shard(ranks - 1, ranks)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config, optimizations, Ranks(shard))
    expected = held_shapes(config, shard)
    layout = stock_layout(model)
    assert {each: rows.shape for each, rows in layout.items()} == expected
    named = {rows.parameter for rows in layout.values()}  # on the meta device, a tied lm_head may be a copy
    held = sum(parameter.numel() for name, parameter in model.named_parameters() if name in named)
    assert held == sum(torch.Size(shape).numel() for shape in expected.values())


@DENSE_LAYOUT
def test_sizes_of_the_suites_agree(name: str, ranks: int) -> None:
    """conformance.sizes has the same numbers without torch."""
    config, shard = DENSE[name].config(), Shard(0, ranks)
    part: Size = DENSE[name].shard(ranks)
    found = (part.heads, part.kv_heads, part.intermediate, part.vocab)
    assert found == tuple(shard.count(unit, config) for unit in ("query heads", "kv heads", "columns", "vocabulary"))
    assert part.parameters == sum(torch.Size(shape).numel() for shape in held_shapes(config, shard).values())


WHOLE_MODULES = r"(input_layernorm|post_attention_layernorm|norm)\.weight"


@pytest.mark.parametrize("tied", [True, False])
def test_every_stock_parameter_is_cut_or_a_norm(tied: bool) -> None:
    """A parameter that a later transformers adds is met by no table: it must not be replicated unseen."""
    for name, _ in uninitialised(small_config(tie_word_embeddings=tied)).named_parameters():
        assert ending(name) in CUTS or re.fullmatch(WHOLE_MODULES, ending(name))


@pytest.mark.skipif(not OF_EXPERTS, reason="this transformers has no Qwen2Moe")
def test_every_stock_parameter_of_a_mixture_is_cut_or_a_norm_or_a_gate() -> None:
    state = one_by_one(uninitialised(mixture()).state_dict())
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == stock_shapes(mixture())
    for name in state:
        assert ending(name) in CUTS or re.fullmatch(rf"{WHOLE_MODULES}|(gate|shared_expert_gate)\.weight", ending(name))


def test_nothing_is_cut_that_the_stock_model_does_not_have() -> None:
    configs = [small_config(), *([mixture()] if OF_EXPERTS else [])]
    names = {ending(name) for config in configs for name in stock_shapes(config)}
    assert {cut for cut in CUTS if OF_EXPERTS or "expert" not in cut} <= names


@pytest.mark.skipif(not OF_EXPERTS, reason="this transformers has no Qwen2Moe")
def test_columns_of_experts_that_ranks_do_not_divide() -> None:
    with pytest.raises(
        UnsupportedError, match=r"and moe_intermediate_size=6, which 4 ranks do not divide; .* for 1, 2"
    ):
        Shard(0, 4).check(mixture(moe_intermediate_size=6))
    with pytest.raises(UnsupportedError, match=r"and shared_expert_intermediate_size=10, which 4 ranks do not divide"):
        Shard(0, 4).check(mixture(shared_expert_intermediate_size=10))
