"""Qwen2 without a head and with those for classification, beside the stock classes."""

from __future__ import annotations

import copy
import inspect
import json

import pytest
import torch
import transformers

import qwen2_npu
from qwen2_npu import Optimizations, Qwen2ForCausalLM, Qwen2ForSequenceClassification, Qwen2Model
from qwen2_npu.compat import cache_of
from qwen2_npu.errors import CheckpointError, UnsupportedError
from qwen2_npu.models.backbone import Backbone
from tests.unit.parallel.virtual import sharded, virtual_ranks
from tests.unit.small import V4, small_config, small_stock, stock_weights

TOLERANCE = 2e-4
"""As in test_qwen2.py: float32, and values of a few tens."""

NAMES = ["Qwen2Model", "Qwen2ForSequenceClassification", "Qwen2ForTokenClassification"]
NAMES = [name for name in NAMES if hasattr(transformers, name)]
SWITCHES = {"none": Optimizations.none(), "all": Optimizations.all()}


def stock_of(name, **changes):
    """A stock model of that class, with the network of small_stock and a head of large numbers."""
    config = small_config(num_labels=5, **changes)
    model = getattr(transformers, name)(config).eval()
    network = {key.removeprefix("model."): value for key, value in small_stock(config).state_dict().items()}
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(network.get(key.removeprefix("model."), torch.randn(parameter.shape) * 0.3))
    return model


def ours_of(stock, optimizations=None):
    ours = getattr(qwen2_npu, type(stock).__name__)
    return ours.from_state_dict(stock.config, stock.state_dict(), optimizations=optimizations)


@pytest.fixture(scope="module", params=NAMES)
def stock(request):
    return stock_of(request.param)


@pytest.fixture(scope="module", params=SWITCHES.values(), ids=SWITCHES)
def pair(request, stock):
    return ours_of(stock, request.param), stock


def ragged(side):
    """Ids, their padding (token 0) on one side, and the mask."""
    ids = torch.randint(1, 199, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[1, :4], mask[2, :7] = 0, 0
    mask = mask if side == "left" else mask.flip(1)
    return ids * mask, mask


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def close(one, other, where=None):
    difference = (one - other).abs()
    return (difference if where is None else difference[where.bool()]).max() < TOLERANCE


def first(output):
    return output[0]


# ---- as the stock classes --------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(pair, side):
    ids, mask = ragged(side)
    call = {"attention_mask": mask, "position_ids": positions(mask), "output_hidden_states": True}
    mine, theirs = (model(ids, **call) for model in pair)
    where = mask if first(mine).dim() == 3 else None
    assert type(mine) is type(theirs)
    assert first(mine).shape == first(theirs).shape
    assert close(first(mine), first(theirs), where)
    assert mine.keys() == theirs.keys()
    assert len(mine.hidden_states) == len(theirs.hidden_states)
    assert close(mine.hidden_states[-1], theirs.hidden_states[-1], mask)


@torch.no_grad()
def test_embeddings_tuples_and_no_cache(pair):
    ids, _ = ragged("left")
    embeds = pair[1].get_input_embeddings()(ids)
    one, other = (model(inputs_embeds=embeds, use_cache=False) for model in pair)
    assert cache_of(one) is None
    assert close(first(one), first(other))
    mine, theirs = (model(ids, return_dict=False) for model in pair)
    assert isinstance(mine, tuple)
    assert len(mine) == len(theirs)
    assert close(mine[0], theirs[0])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimizations", SWITCHES.values(), ids=SWITCHES)
def test_embeddings_of_16_bits_are_no_ids_either(stock, optimizations, dtype):
    model, ids = ours_of(stock, optimizations).to(dtype), ragged("left")[0].clamp(min=1)
    embeds = model.get_input_embeddings()(ids)
    assert embeds.dtype == dtype
    assert torch.equal(first(model(inputs_embeds=embeds)), first(model(ids)))


@torch.no_grad()
@pytest.mark.parametrize("optimizations", SWITCHES.values(), ids=SWITCHES)
def test_a_cache_is_continued(optimizations):
    stock = stock_of("Qwen2Model")
    model = ours_of(stock, optimizations)
    ids = ragged("left")[0]
    begun = model(ids[:, :8], use_cache=True)
    assert close(model(ids[:, 8:], past_key_values=cache_of(begun)).last_hidden_state, stock(ids)[0][:, 8:])
    last = model(ids[:, -1:], past_key_values=model(ids[:, :-1], use_cache=True)[1])
    assert close(last.last_hidden_state, stock(ids)[0][:, -1:])


@torch.no_grad()
@pytest.mark.skipif("Qwen2ForTokenClassification" not in NAMES, reason="transformers 4.37.0 has no such class")
def test_the_loss_of_tokens():
    stock = stock_of("Qwen2ForTokenClassification")
    ids, mask = ragged("right")
    labels = ids % 5
    labels[mask == 0] = -100
    labels[0, :3] = -100
    mine, theirs = (model(ids, attention_mask=mask, labels=labels) for model in (ours_of(stock), stock))
    assert close(mine.loss, theirs.loss)
    with pytest.raises(ValueError, match=r"label 5 is outside the vocabulary|label 5"):
        ours_of(stock)(ids, labels=labels.masked_fill(labels == 4, 5))
    with pytest.raises(ValueError, match=r"labels of shape \(3, 2\): pass \(3, 12\)"):
        ours_of(stock)(ids, labels=labels[:, :2])


@torch.no_grad()
@pytest.mark.skipif("Qwen2ForTokenClassification" not in NAMES, reason="transformers 4.37.0 has no such class")
def test_the_loss_of_tokens_after_a_cache_is_masked_by_the_last_columns():
    model = ours_of(stock_of("Qwen2ForTokenClassification"))
    ids, mask = ragged("right")
    mask = torch.cat((torch.ones(3, 4, dtype=torch.int64), mask[:, 4:]), dim=1)
    cache, labels = model.allocate_cache(3, 12), ids[:, 4:] % 5
    model(ids[:, :4], attention_mask=mask[:, :4], past_key_values=cache)
    found = model(ids[:, 4:], attention_mask=mask, past_key_values=cache, labels=labels)
    live = mask[:, 4:].bool()
    assert close(found.loss, torch.nn.functional.cross_entropy(found.logits[live], labels[live]))


@torch.no_grad()
@pytest.mark.skipif("Qwen2ForTokenClassification" not in NAMES, reason="transformers 4.37.0 has no such class")
def test_the_loss_of_tokens_is_summed_in_float32():
    """As the stock class does: in bfloat16 a mean over many tokens has three digits."""
    stock = stock_of("Qwen2ForTokenClassification")
    ids = ragged("left")[0]
    found = ours_of(stock).bfloat16()(ids, labels=ids % 5)
    assert found.loss.dtype == stock.bfloat16()(ids, labels=ids % 5).loss.dtype == torch.float32
    expected = torch.nn.functional.cross_entropy(found.logits.double().flatten(0, 1), (ids % 5).flatten())
    assert abs(float(found.loss) - float(expected)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    ("problem", "labels"),
    [
        (None, torch.tensor([0, 4, 2])),
        (None, torch.rand(3, 5)),
        ("regression", torch.rand(3, 5)),
        ("single_label_classification", torch.tensor([1, 1, 3])),
        ("multi_label_classification", torch.eye(5)[:3]),
    ],
    ids=["classes", "numbers", "regression", "single label", "multi label"],
)
def test_the_loss_of_sequences(problem, labels):
    stock = stock_of("Qwen2ForSequenceClassification", problem_type=problem)
    ids, mask = ragged("right")
    mine, theirs = (model(ids, attention_mask=mask, labels=labels) for model in (ours_of(stock), stock))
    assert close(mine.loss, theirs.loss)
    assert close(mine.logits, theirs.logits)
    assert list(mine)[:2] == list(theirs)[:2] == ["loss", "logits"]
    assert close(ours_of(stock)(ids, attention_mask=mask, labels=labels, return_dict=False)[0], theirs.loss)


@torch.no_grad()
def test_the_kind_of_problem_is_found_out_in_every_call():
    """The stock class writes that of the first call into its configuration; a later call may have other labels."""
    model, (ids, mask) = ours_of(stock_of("Qwen2ForSequenceClassification")), ragged("right")
    for labels in (torch.tensor([0, 4, 2]), torch.rand(3, 5), torch.tensor([1, 1, 3])):
        fresh = ours_of(stock_of("Qwen2ForSequenceClassification"))
        losses = [each(ids, attention_mask=mask, labels=labels).loss for each in (model, fresh)]
        assert torch.equal(*losses)
        assert model.config.problem_type is None


@torch.no_grad()
def test_one_label_is_a_regression():
    config = small_config(num_labels=1)
    torch.manual_seed(2)
    stock = transformers.Qwen2ForSequenceClassification(config).eval()
    ids, mask = ragged("left")
    for labels in (torch.rand(3), torch.rand(3, 1)):
        mine, theirs = (model(ids, attention_mask=mask, labels=labels) for model in (ours_of(stock), stock))
        assert close(mine.loss, theirs.loss)


@pytest.mark.parametrize("name", [name for name in NAMES if "Classification" in name])
def test_a_loss_to_train_by_is_refused(name):
    """No parameter requires a gradient: a training loop would run, and learn nothing."""
    model = ours_of(stock_of(name))
    ids = ragged("left")[0]
    labels = ids % 5 if "Token" in name else ids[:, -1] % 5
    assert model(ids, labels=labels).loss is not None
    model.train()
    with pytest.raises(UnsupportedError, match="train the stock model"):
        model(ids, labels=labels)
    with torch.no_grad():
        assert model(ids, labels=labels).loss is not None


# ---- get_decoder -----------------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("optimizations", SWITCHES.values(), ids=SWITCHES)
def test_the_decoder_gives_hidden_states(optimizations):
    """Over the weights of the model itself, whatever becomes of them."""
    stock = small_stock()
    model = Qwen2ForCausalLM.from_state_dict(stock.config, stock_weights(stock), optimizations=optimizations)
    ids, mask = ragged("left")
    call = {"attention_mask": mask, "position_ids": positions(mask)}
    decoder = model.get_decoder()
    assert isinstance(decoder, Qwen2Model)
    assert decoder is model.get_decoder()
    assert decoder is decoder.get_decoder()
    assert close(decoder(ids, **call)[0], stock.get_decoder()(ids, **call)[0], mask)
    assert decoder.get_input_embeddings() is model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    assert set(dict(model.named_parameters())) == set(dict(decoder.named_parameters())) | {"lm_head.weight"}
    assert not any(parameter.is_meta for parameter in decoder.parameters())
    model.bfloat16()
    assert decoder(ids, **call)[0].dtype == decoder.dtype == torch.bfloat16
    other = copy.deepcopy(model)
    assert other.get_decoder().model is other.model is not model.model


@torch.no_grad()
@pytest.mark.parametrize("optimizations", SWITCHES.values(), ids=SWITCHES)
def test_the_decoder_of_a_part_is_that_part(optimizations):
    """Its caches have the heads of this rank, and its answer is that of all ranks."""
    stock, ids = small_stock(small_config(num_hidden_layers=1)), ragged("left")[0]
    expected = stock.model(ids)[0]

    def run(ranks):
        decoder = sharded(stock.config, stock_weights(stock), ranks, optimizations).get_decoder()
        begun = decoder(ids[:, :8], use_cache=True)
        return torch.cat((begun[0], decoder(ids[:, 8:], past_key_values=cache_of(begun))[0]), dim=1)

    with virtual_ranks(2) as on_all:
        assert all(close(found, expected) for found in on_all(run))


# ---- checkpoints -----------------------------------------------------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_checkpoints_of_either(stock, tmp_path, tied):
    """Ours of theirs and theirs of ours, of the same class; the names in the folder are the stock ones."""
    stock = stock_of(type(stock).__name__, tie_word_embeddings=tied)
    stock.save_pretrained(tmp_path / "theirs", safe_serialization=True)
    ours = getattr(qwen2_npu, type(stock).__name__).from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again = type(stock).from_pretrained(tmp_path / "ours").eval()
    ids, mask = ragged("left")
    call = {"attention_mask": mask, "position_ids": positions(mask)}
    where = mask if first(stock(ids)).dim() == 3 else None
    assert close(first(ours(ids, **call)), first(stock(ids, **call)), where)
    assert close(first(again(ids, **call)), first(stock(ids, **call)), where)
    assert ours.stock_state_dict().keys() == stock.state_dict().keys()
    assert again.config.architectures == [type(stock).__name__]
    assert not (tmp_path / "ours" / "generation_config.json").exists()


@torch.no_grad()
@pytest.mark.parametrize("name", ["Qwen2ForCausalLM", *NAMES])
def test_a_model_without_a_head_is_read_from_any_checkpoint(tmp_path, name):
    stock = small_stock() if name == "Qwen2ForCausalLM" else stock_of(name)
    stock.save_pretrained(tmp_path, safe_serialization=True)
    theirs = transformers.Qwen2Model.from_pretrained(tmp_path).eval()
    ids = ragged("left")[0]
    assert close(Qwen2Model.from_pretrained(tmp_path)(ids)[0], theirs(ids)[0])


def test_a_saved_folder_names_the_class_that_wrote_it(tmp_path):
    """Auto classes and servers look there; what was read may have been another class's."""
    stock_of("Qwen2ForSequenceClassification").save_pretrained(tmp_path / "stock", safe_serialization=True)
    for ours in (Qwen2ForSequenceClassification, Qwen2Model):
        model = ours.from_pretrained(tmp_path / "stock")
        model.save_pretrained(tmp_path / ours.__name__)
        config = json.loads((tmp_path / ours.__name__ / "config.json").read_text(encoding="utf-8"))
        assert config["architectures"] == [ours.__name__]


def test_a_head_that_is_not_in_the_checkpoint(tmp_path):
    """The stock classes make up random numbers."""
    small_stock().save_pretrained(tmp_path / "lm", safe_serialization=True)
    with pytest.raises(CheckpointError, match=r"1 tensors missing, first score\.weight"):
        Qwen2ForSequenceClassification.from_pretrained(tmp_path / "lm")
    stock_of("Qwen2ForSequenceClassification").save_pretrained(tmp_path / "scores", safe_serialization=True)
    with pytest.raises(CheckpointError, match=r"1 tensors missing, first lm_head\.weight; 1 tensors unexpected"):
        Qwen2ForCausalLM.from_pretrained(tmp_path / "scores")
    with pytest.raises(CheckpointError, match=r"score\.weight has shape \(5, 256\), expected \(2, 256\)"):
        Qwen2ForSequenceClassification.from_pretrained(tmp_path / "scores", num_labels=2)


@torch.no_grad()
def test_a_causal_language_model_of_a_network_with_tied_embeddings(tmp_path):
    stock = stock_of("Qwen2Model", tie_word_embeddings=True)
    stock.save_pretrained(tmp_path, safe_serialization=True)
    ids = ragged("left")[0]
    theirs = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path).eval()
    assert close(Qwen2ForCausalLM.from_pretrained(tmp_path)(ids).logits, theirs(ids).logits)


# ---- what is handed on -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("given_as", ["input_ids", "inputs_embeds"])
def test_a_head_hands_on_every_argument_that_it_takes(name, given_as, monkeypatch):
    """All but labels, and of a classifier return_dict: it needs the fields to make its own output of them."""
    ours = getattr(qwen2_npu, name)
    model, signature, handed = ours(small_config(num_hidden_layers=1)), inspect.signature(Backbone.forward), {}

    def forward(*given, **more):
        handed.update(signature.bind(*given, **more).arguments)
        raise InterruptedError

    monkeypatch.setattr(Backbone, "forward", forward)
    own = {"self", "others", "labels", "input_ids", "inputs_embeds"} | (
        {"return_dict"} if name != "Qwen2Model" else set()
    )
    given = {argument: object() for argument in inspect.signature(ours.forward).parameters if argument not in own}
    given[given_as] = torch.ones(1, 3, dtype=torch.int64) if given_as == "input_ids" else torch.ones(1, 3, 256)
    with pytest.raises(InterruptedError):
        model(**given)
    assert {argument: value for argument, value in given.items() if handed.get(argument) is not value} == {}


# ---- what is refused -------------------------------------------------------------------------------------------------
def test_what_a_head_does_not_take(stock):
    model = ours_of(stock)
    ids = ragged("left")[0]
    with pytest.raises(TypeError, match=rf"^{type(stock).__name__}\.forward\(\) takes no argument logits_to_keep"):
        model(ids, logits_to_keep=1)
    with pytest.raises(TypeError, match=rf"^{type(stock).__name__} generates no tokens: .* with Qwen2ForCausalLM"):
        model.generate(ids)
    with pytest.raises(ValueError, match="pass exactly one of input_ids and inputs_embeds"):
        model()
    assert model.can_generate() is False


def test_a_sequence_without_a_last_token():
    stock = stock_of("Qwen2ForSequenceClassification", pad_token_id=None)
    ids, mask = ragged("right")
    with pytest.raises(ValueError, match=r"a batch of 3 and config\.pad_token_id=None: set it to the padding token"):
        ours_of(stock)(ids, attention_mask=mask)
    with torch.no_grad():
        assert close(ours_of(stock)(ids[:1]).logits, stock(ids[:1]).logits)
    with pytest.raises(ValueError, match=r"row 0: attention_mask is 0 at position 11, the last token that is not"):
        ours_of(stock)(ids[1:2], attention_mask=mask[1:2])


@torch.no_grad()
def test_scores_are_of_the_last_token_that_is_no_padding():
    """Wherever padding stands, also among the tokens; and of the last of all where embeddings are given."""
    stock = stock_of("Qwen2ForSequenceClassification")
    model = ours_of(stock)
    ids = torch.tensor([[7, 0, 9, 0, 0], [0, 3, 0, 0, 5], [8, 0, 0, 0, 0]])
    mask = torch.ones_like(ids)
    hidden = model.get_decoder()(ids, attention_mask=mask).last_hidden_state
    expected = model.score(hidden[torch.arange(3), torch.tensor([2, 4, 0])])
    assert close(model(ids, attention_mask=mask).logits, expected)
    embeds = model.get_input_embeddings()(ids)
    assert close(model(inputs_embeds=embeds, attention_mask=mask).logits, model.score(hidden[:, -1]))
    assert close(stock(inputs_embeds=embeds, attention_mask=mask).logits, model.score(hidden[:, -1]))


@torch.no_grad()
def test_a_sequence_that_continues_a_cache_is_masked_by_the_last_columns():
    model = ours_of(stock_of("Qwen2ForSequenceClassification"))
    ids = ragged("left")[0].clamp(min=1)
    for masked in (0, 11):
        mask, cache = torch.ones(3, 12, dtype=torch.int64), model.allocate_cache(3, 12)
        mask[1, masked] = 0
        model(ids[:, :8], attention_mask=mask[:, :8], past_key_values=cache)
        if masked == 11:
            with pytest.raises(ValueError, match=r"^row 1: attention_mask is 0 at position 3, the last token that is"):
                model(ids[:, 8:], attention_mask=mask, past_key_values=cache)
            continue
        found = model(ids[:, 8:], attention_mask=mask, past_key_values=cache).logits
        assert close(found, model(ids, attention_mask=mask).logits)


@pytest.mark.parametrize("shape", [(2, 12), (4, 12), (3, 11), (3, 13), (3, 1, 12)])
def test_masks_of_another_shape_are_refused_as_by_the_other_models(shape):
    with pytest.raises(ValueError, match=r"^attention_mask "):
        ours_of(stock_of("Qwen2ForSequenceClassification"))(ragged("left")[0], attention_mask=torch.ones(shape))


@torch.no_grad()
@pytest.mark.parametrize(
    "labels", [torch.tensor([0, 4, 2]).int(), torch.tensor([[0], [4], [2]])], ids=["int32", "rows"]
)
def test_classes_of_another_form(labels):
    ids, mask = ragged("right")
    model = ours_of(stock_of("Qwen2ForSequenceClassification"))
    found = model(ids, attention_mask=mask, labels=labels)
    assert close(found.loss, torch.nn.functional.cross_entropy(found.logits, labels.flatten().long()))


def test_a_kind_of_problem_that_is_none():
    model, (ids, mask) = ours_of(stock_of("Qwen2ForSequenceClassification")), ragged("right")
    model.config.problem_type = "ranking"
    with pytest.raises(ValueError, match=r"^config.problem_type='ranking': use regression, single_label"):
        model(ids, attention_mask=mask, labels=torch.rand(3, 5))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 5, 1]), "label 5 is outside"),
        (torch.tensor([0, -1, 1]), "label -1 is outside"),
        (torch.tensor([[0, 1, 2]]), r"labels of shape \(1, 3\) .*pass \(3,\)"),
        (torch.tensor([0, 1]), r"labels of shape \(2,\) .*pass \(3,\)"),
        (torch.rand(3, 4), r"labels of shape \(3, 4\) .*pass \(3, 5\)"),
        ([1, 2, 3], "labels is a list"),
    ],
)
def test_labels_of_sequences_that_do_not_fit(labels, message):
    ids, mask = ragged("right")
    with pytest.raises(ValueError, match=message):
        ours_of(stock_of("Qwen2ForSequenceClassification"))(ids, attention_mask=mask, labels=labels)


@pytest.mark.skipif(V4, reason="4.37.0 has not every class")
def test_every_class_is_public():
    for name in ("Qwen2ForCausalLM", *NAMES):
        assert name in qwen2_npu.__all__
