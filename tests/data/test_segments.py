from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kl3m_nb.data import loader, segments, tokenizer, windows
from kl3m_nb.model import decoder
from kl3m_nb.optim.loss import training_loss
from kl3m_nb.optim.objective import chunked_objective
from kl3m_nb.runs.metrics import read_metrics
from kl3m_nb.training import loop
from tests.conftest import at_step, small_profile
from tests.data.test_documents import saved_and_loaded
from tests.data.test_tokenizer import TEXTS


@pytest.fixture(scope="module", params=["ordinary", "unorthodox"])
def trained(request):
    return tokenizer.train_tokenizer(TEXTS, 900, request.param)


def _spec(**changes):
    profile = small_profile(packing="segments", vocabulary=900)
    return dataclasses.replace(profile.data, **changes)


def test_borders_stand_behind_empty_lines_and_full_stops(trained):
    borders = segments.TextBorders(trained)
    text = (
        "1. Grant of rights. The licensor grants; the licensee takes.\n\nSecond paragraph\nover two"
        " lines.\n \n  Third."
    )
    tokens = np.array(trained.encode(text))

    def before(positions):
        return [trained.decode(tokens[:position]).strip() for position in positions]

    first = "1. Grant of rights. The licensor grants; the licensee takes."
    second = first + "\n\nSecond paragraph\nover two lines."
    assert before(borders.paragraphs(tokens)) == [first, second]
    ends = [first[:2], first[:19], first[:40], first, second]
    assert set(before(borders.sentences(tokens))) == set(ends)


@given(
    st.lists(st.sampled_from(["word", "Law.", "\n\n", "\n", "a;", "  "]), max_size=120),
    st.integers(3, 30),
)
@settings(max_examples=60, deadline=None)
def test_segments_laid_end_to_end_are_the_document(parts, most):
    trained = _module_tokenizer()
    tokens = np.array(trained.encode(" ".join(parts), add_special_tokens=False), dtype=np.int32)
    found = list(segments.segments(tokens, _module_borders(), most, 0, 1))
    assert all(2 <= len(segment) <= most for segment in found)
    assert np.concatenate(found).tolist() == [0, *tokens.tolist(), 1]


def test_cuts_prefer_paragraphs_then_sentences_then_nothing():
    trained, borders = _module_tokenizer(), _module_borders()

    def cut(text, most):
        tokens = np.array(trained.encode(text, add_special_tokens=False), dtype=np.int32)
        return [
            trained.decode(segment, skip_special_tokens=True)
            for segment in segments.segments(tokens, borders, most, 0, 1)
        ]

    sentence = "The licensee shall pay the fee. "
    size = len(trained.encode(sentence))
    paragraphs = cut(sentence * 4 + "\n\n" + sentence * 9, 6 * size)
    assert paragraphs[0].rstrip() == (sentence * 4).rstrip()
    sentences = cut(sentence * 9, 4 * size)
    assert len(sentences) > 1 and all(segment.rstrip().endswith("fee.") for segment in sentences)
    whole = cut("shall " * 50, 20)
    assert len(whole) >= 3


def test_a_batch_pads_at_random_and_masks_what_it_pads(trained):
    spec = _spec(seq_len=256)
    batch = loader.open_stream(spec, trained).take(200)
    mask, labels = batch.attention_mask, batch.labels
    assert batch.input_ids.shape == labels.shape == mask.shape == (200, 256)
    assert (batch.input_ids[~mask] == trained.pad_token_id).all() and (labels[~mask] == -100).all()
    assert (labels[mask] != -100).all()
    lefts, lengths = mask.int().argmax(dim=1), mask.sum(dim=1)
    for row in range(200):
        place = slice(lefts[row], lefts[row] + lengths[row])
        assert mask[row, place].all() and torch.equal(
            batch.input_ids[row, place][1:], labels[row, place][:-1]
        )
    short = lengths < 200
    rights = 256 - lefts - lengths
    assert short.sum() > 20 and (lefts[short] > 0).any() and (rights[short] > 0).any()
    assert (lefts[short] == 0).float().mean() < 0.5
    # a start stands only at the beginning of a sequence, an end only as a last label
    starts = (batch.input_ids == trained.bos_token_id).nonzero()
    assert len(starts) and all(column == lefts[row] for row, column in starts)
    ends = (labels == trained.eos_token_id).nonzero()
    assert len(ends) and all(column == lefts[row] + lengths[row] - 1 for row, column in ends)


@pytest.mark.parametrize("loss", ["response", "all"])
def test_cotraining_mixes_pairs_at_their_share(loss):
    trained = _module_tokenizer()
    spec = _spec(seq_len=512, p_sft=0.3, sft_loss=loss)
    batch = loader.open_stream(spec, trained).take(400)
    opening, closing = trained.convert_tokens_to_ids(["<|instruction|>", "</|instruction|>"])
    pairs = (batch.input_ids == opening).any(dim=1)
    assert pairs.float().mean().item() == pytest.approx(0.3, abs=0.1)
    for inputs, labels in zip(batch.input_ids[pairs], batch.labels[pairs], strict=True):
        first = int((inputs == closing).nonzero()[0])
        if loss == "response":
            assert (labels[:first] == -100).all()
        assert labels[first] != -100


@pytest.mark.parametrize("workers", [0, 1])
def test_segments_resume(workers):
    trained, spec = _module_tokenizer(), _spec(seq_len=400, p_sft=0.2)
    whole = loader.open_stream(spec, trained)
    whole.take(60)
    expected = whole.take(200)
    interrupted = loader.PrefetchedStream(loader.open_stream(spec, trained), 2 * workers)
    for _ in range(10):
        interrupted.take(6)
    resumed = loader.PrefetchedStream(loader.open_stream(spec, trained), 2 * workers)
    resumed.load_state_dict(saved_and_loaded(interrupted.state_dict()))
    found = resumed.take(200)
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("experts", [0, 4])
def test_padding_has_no_influence_on_loss_and_gradients(experts):
    """A padded batch against its sequences one by one, each cut to its own length and without a
    mask.
    """
    torch.manual_seed(0)
    profile = small_profile(
        experts=experts, active_experts=min(2, experts), sliding_window=8 if experts else 0
    )
    model = decoder.build_model(profile)
    head = model.get_output_embeddings().weight
    lengths, lefts = [12, 32, 5], [13, 0, 27]
    input_ids = torch.full((3, 32), 2)
    labels, mask = torch.full((3, 32), -100), torch.zeros(3, 32, dtype=torch.bool)
    for row, (length, left) in enumerate(zip(lengths, lefts, strict=True)):
        input_ids[row, left : left + length] = torch.randint(10, 500, (length,))
        labels[row, left : left + length] = torch.randint(10, 500, (length,))
        mask[row, left : left + length] = True
    body = decoder.forward_body(model, input_ids, mask)
    padded = chunked_objective(body.hidden, head, labels, profile.objective, num_valid=sum(lengths))
    padded.total.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    totals = []
    for row, (length, left) in enumerate(zip(lengths, lefts, strict=True)):
        place = slice(left, left + length)
        alone = decoder.forward_body(model, input_ids[row : row + 1, place])
        terms = chunked_objective(
            alone.hidden,
            head,
            labels[row : row + 1, place],
            profile.objective,
            num_valid=sum(lengths),
        )
        terms.total.backward()
        totals.append(terms.total.item())
    assert padded.total.item() == pytest.approx(sum(totals), rel=1e-5)
    for padded_gradient, parameter in zip(gradients, model.parameters(), strict=True):
        assert torch.allclose(padded_gradient, parameter.grad, atol=1e-5, rtol=1e-4)
    if experts:
        other = input_ids.masked_fill(~mask, 7)
        assert torch.allclose(
            decoder.forward_body(model, other, mask).router_loss, body.router_loss, rtol=1e-5
        )


@pytest.mark.parametrize("experts", [0, 4])
def test_where_the_padding_lies_changes_nothing(experts):
    """Rotary positions are relative, padding is masked and has no label: in float64 only rounding
    is left, far below 1e-6.
    """
    profile = small_profile(
        experts=experts, active_experts=min(2, experts), router_aux_loss=0.05 * bool(experts)
    )
    model = decoder.build_model(profile).double()
    model.set_experts_implementation("eager")  # grouped products know no float64
    generator = torch.Generator().manual_seed(0)
    lengths, results = [12, 32, 5], []
    tokens = [torch.randint(10, 500, (length + 1,), generator=generator) for length in lengths]
    for lefts in ([0, 0, 0], [20, 0, 27], [7, 0, 13]):
        input_ids, labels, mask = (
            torch.full((3, 32), 2),
            torch.full((3, 32), -100),
            torch.zeros(3, 32, dtype=torch.bool),
        )
        for row, (sample, left) in enumerate(zip(tokens, lefts, strict=True)):
            place = slice(left, left + lengths[row])
            input_ids[row, place], labels[row, place], mask[row, place] = (
                sample[:-1],
                sample[1:],
                True,
            )
        batch = windows.Batch(input_ids, labels, mask)
        model.zero_grad()
        total, _ = training_loss(model, batch, sum(lengths), sum(lengths), profile, False, False)
        total.backward()
        results.append(
            torch.cat(
                [
                    total.detach().view(1),
                    *(parameter.grad.flatten() for parameter in model.parameters()),
                ]
            )
        )
    for moved in results[1:]:
        assert (moved - results[0]).norm() < 1e-6 * results[0].norm()


def test_a_cotraining_run_is_resumed_bit_for_bit(tmp_path):
    profile = small_profile(
        packing="segments",
        p_sft=0.5,
        context=300,
        seq_len=300,
        micro_batch=1,
        grad_accumulation=2,
        held_out_windows=2,
        max_steps=4,
        experts=4,
        active_experts=2,
    )
    loop.train(profile, tmp_path / "whole")

    with pytest.raises(SystemExit, match="a crash"):
        loop.train(
            dataclasses.replace(
                profile, runtime=dataclasses.replace(profile.runtime, checkpoint_every=1)
            ),
            tmp_path / "run",
            callbacks=[at_step(2, lambda: sys.exit("a crash"))],
        )
    loop.train(profile, tmp_path / "run")
    whole, run = (read_metrics(tmp_path / name, "train") for name in ("whole", "run"))
    assert list(whole.loss) == list(run.loss) and list(whole.valid_tokens) == list(run.valid_tokens)
    assert (whole.valid_tokens < whole.tokens).all()


def test_dense_packing_has_no_padding():
    batch = windows.PackedStream(_spec(packing="dense"), _module_tokenizer()).take(4)
    assert batch.attention_mask is None and batch.valid_tokens == batch.labels.numel()


_CACHE = {}


def _module_tokenizer():
    if "tokenizer" not in _CACHE:
        _CACHE["tokenizer"] = tokenizer.train_tokenizer(TEXTS, 900)
    return _CACHE["tokenizer"]


def _module_borders():
    if "borders" not in _CACHE:
        _CACHE["borders"] = segments.TextBorders(_module_tokenizer())
    return _CACHE["borders"]
