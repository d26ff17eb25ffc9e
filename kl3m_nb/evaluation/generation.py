"""What a model writes: the project's prompts, continued by transformers' own `generate` in seeded
batches with a KV cache.

How well that is written is measured in `writing`. The cards' own calls, through `pipeline`, are
repeated here as they stand.
"""

from __future__ import annotations

import contextlib
import html
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from kl3m_nb.common.paths import checkpoint_place, prompts_dir
from kl3m_nb.data.special_ids import stop_ids
from kl3m_nb.data.tokenizer import read_tokenizer
from kl3m_nb.evaluation.extraction import as_instruction, is_decided
from kl3m_nb.model.scoring import evaluation_mode
from kl3m_nb.profiles import usage_of

ANSWER_TOKENS = 64  # the longest right answer to an extraction takes 55 of a vocabulary of 4,096


PROMPT_KINDS = ("card", "clause", "regulation", "citation", "extraction")


@dataclass(frozen=True)
class Prompt:
    """One prompt of `data/prompts/prompts.jsonl`."""

    id: str
    kind: str  # one of PROMPT_KINDS
    text: str
    expected: Mapping[str, object] = field(
        default_factory=dict
    )  # the answer to an extraction; other kinds have none


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the defaults are the kl3m-007 card's advice. `advised_sampling`
    knows each profile's.

    Nothing else filters the distribution: transformers' own default of `top_k = 50` is switched
    off. Temperature 0 takes the likeliest token.
    """

    temperature: float = 0.8
    top_p: float = 0.95
    repetition_penalty: float = 1.0
    max_new_tokens: int = 100

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and self.temperature >= 0):
            raise ValueError(
                f"The temperature is {self.temperature!r}; it must be 0 (greedy) or more."
            )
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p is {self.top_p!r}; it must be above 0 and at most 1.")
        if not (_is_number(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(
                f"The repetition_penalty is {self.repetition_penalty!r}; it must be above 0, and 1"
                " for none."
            )
        if not (
            _is_number(self.max_new_tokens)
            and isinstance(self.max_new_tokens, Integral)
            and self.max_new_tokens >= 1
        ):
            raise ValueError(
                f"max_new_tokens is {self.max_new_tokens!r}; it must be a whole number, at least 1."
            )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Sample:
    """One continuation."""

    prompt: str
    text: str  # the continuation alone, special tokens left out
    prompt_tokens: tuple[int, ...]
    tokens: tuple[int, ...]  # ids of the continuation, without the end-of-text token
    end_tokens: tuple[int, ...]  # the end-of-text token if the model wrote it; empty if it was cut
    seconds: float  # its share of the batch's time: these add up to the time of the whole call

    @property
    def ended(self) -> bool:
        """The model ended the text by itself."""
        return bool(self.end_tokens)


def advised_sampling(card: str) -> Sampling:
    """Temperature 0.8, top-p 0.95 and no repetition penalty by the kl3m-007 card; temperature 0.5
    alone by kl3m-002's.

    Raises ValueError for a card that advises nothing.
    """
    arguments = usage_of(card).arguments
    return Sampling(
        arguments["temperature"], arguments.get("top_p", 1.0), 1.0, arguments["max_new_tokens"]
    )


def chosen_sampling(
    card: str, temperature: float, top_p: float, repetition_penalty: float, max_new_tokens: int
) -> Sampling:
    """A sampling by a notebook's parameters: what the card advises where the temperature is below
    0, or top_p is 0.

    Raises ValueError for a card that advises nothing and values that no sampling has.
    """
    advised = advised_sampling(card)
    takes_advice = _is_number(temperature) and temperature < 0
    return Sampling(
        advised.temperature if takes_advice else temperature,
        top_p or advised.top_p,
        repetition_penalty,
        max_new_tokens,
    )


def run_card(checkpoint: str | Path, card: str, seed: int) -> list[list[str]]:
    """The card's own call, argument for argument, on `checkpoint` (a folder or hub id): for each
    prompt the whole texts.

    The card leaves transformers' default of top_k = 50 in force, so these texts differ from those
    of `generate`. The caller's random state is left as it was. Raises ValueError for a card that
    prints no call.
    """
    usage = usage_of(card)
    writer = pipeline(
        "text-generation",
        model=checkpoint_place(checkpoint).name,
        tokenizer=read_tokenizer(str(checkpoint)),
    )
    device = writer.model.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        _seed(device, seed)
        return [
            [written["generated_text"] for written in writer(prompt, **usage.arguments)]
            for prompt in usage.prompts
        ]


def load_prompts(kind: str | None = None) -> list[Prompt]:
    """The project's prompts in the order of the file, of one kind or (without `kind`) of all kinds;
    the cards' come first.

    Raises ValueError for an unknown kind.
    """
    if kind is not None and kind not in PROMPT_KINDS:
        raise ValueError(
            f"There are no prompts of the kind {kind!r}; choose one of {', '.join(PROMPT_KINDS)}."
        )
    lines = (prompts_dir() / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [Prompt(**json.loads(line)) for line in lines]
    return [prompt for prompt in prompts if kind in (None, prompt.kind)]


def choose_prompts(count: int) -> list[Prompt]:
    """Up to `count` prompts: the cards', then others spread evenly over the file, so that every
    kind is there.
    """
    cards, others = (
        load_prompts("card"),
        [prompt for prompt in load_prompts() if prompt.kind != "card"],
    )
    wanted = max(0, min(count - len(cards), len(others)))
    return [*cards, *(others[i * len(others) // wanted] for i in range(wanted))][:count]


def check_room(
    context: int, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], sampling: Sampling
) -> None:
    """Raises ValueError for a prompt without tokens, and for one that leaves no room for
    `max_new_tokens` in `context` tokens.
    """
    for prompt in prompts:
        length = len(tokenizer(prompt)["input_ids"])
        if length == 0:
            raise ValueError(
                f"The prompt {prompt!r} has no tokens; give the model at least one to continue."
            )
        if length + sampling.max_new_tokens > context:
            raise ValueError(
                f"The prompt {prompt[:40]!r} has {length} tokens, which with max_new_tokens"
                f" {sampling.max_new_tokens} exceeds the model's context of {context}; shorten the"
                " prompt or lower max_new_tokens."
            )


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    sampling: Sampling,
    seed: int,
    batch_size: int = 16,
    is_whole: Callable[[str, str], bool] | None = None,
) -> list[Sample]:
    """One sampled continuation for every prompt, in the order of `prompts`; a prompt given twice is
    sampled twice. A text is cut after max_new_tokens or, with `is_whole`, before that, as soon as
    it says so of a prompt and its continuation.

    The same seed, prompts and batch size give the same samples on the same machine; the caller's
    random state and the model's mode are left as they were. A text ends at the tokens of
    `stop_ids`; where there are none it is cut. Raises ValueError for a prompt without tokens and
    for one that leaves no room for `max_new_tokens` in the model's context.
    """
    config = _generation_config(sampling, model, tokenizer)
    check_room(model.config.max_position_embeddings, tokenizer, prompts, sampling)
    samples = []
    with (
        evaluation_mode(model),
        torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []),
    ):
        _seed(model.device, seed)
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            watch = _WholeTexts(tokenizer, batch, is_whole) if is_whole else None
            samples += _generate_batch(model, tokenizer, batch, config, watch)
    return samples


def answer_extractions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    cotrained: bool,
    seed: int = 0,
) -> list[Sample]:
    """The answers to extraction prompts, in their order: greedy, up to 64 tokens, each cut where
    its JSON is closed or broken.

    A model that was `cotrained` on instruction pairs is asked in their template, any other by the
    plain text.
    """
    asked = [
        as_instruction(prompt.text, tokenizer) if cotrained else prompt.text for prompt in prompts
    ]
    plain = dict(zip(asked, (prompt.text for prompt in prompts), strict=True))
    sampling = Sampling(temperature=0, max_new_tokens=ANSWER_TOKENS)
    return generate(
        model,
        tokenizer,
        asked,
        sampling,
        seed,
        32,
        lambda prompt, text: is_decided(plain[prompt], text),
    )


def generate_streaming(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    sampling: Sampling,
    seed: int,
    on_text: Callable[[str], None],
    should_stop: Callable[[], bool],
) -> Sample:
    """The sample `generate` gives for this prompt alone, told while it grows.

    `on_text` gets the whole continuation so far after every token; when `should_stop` says so, the
    text is cut there. Raises ValueError like `generate`.
    """
    config = _generation_config(sampling, model, tokenizer)
    check_room(model.config.max_position_embeddings, tokenizer, [prompt], sampling)

    class Teller(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] | None = None  # the first call brings the prompt

        def put(self, value: torch.Tensor) -> None:
            self.tokens = [] if self.tokens is None else [*self.tokens, *value.flatten().tolist()]
            on_text(_decode(tokenizer, self.tokens))

        def end(self) -> None:
            pass

    class Stop(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
            return torch.full((input_ids.shape[0],), should_stop(), device=input_ids.device)

    with (
        evaluation_mode(model),
        torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []),
    ):
        _seed(model.device, seed)
        (sample,) = _generate_batch(model, tokenizer, [prompt], config, Stop(), streamer=Teller())
    return sample


class _WholeTexts(StoppingCriteria):
    """Ends the rows of a batch one by one; `lengths` has the tokens of those that are whole."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[str],
        is_whole: Callable[[str, str], bool],
    ) -> None:
        self._tokenizer, self._prompts, self._is_whole = tokenizer, prompts, is_whole
        self._steps = 0
        self.lengths: dict[int, int] = {}

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        self._steps += 1
        for row, tokens in enumerate(input_ids[:, -self._steps :].tolist()):
            if row not in self.lengths and self._is_whole(
                self._prompts[row], _decode(self._tokenizer, tokens)
            ):
                self.lengths[row] = self._steps
        return torch.tensor(
            [row in self.lengths for row in range(len(input_ids))], device=input_ids.device
        )


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _generate_batch(
    model,
    tokenizer,
    prompts: Sequence[str],
    config: GenerationConfig,
    stop: StoppingCriteria | None = None,
    streamer=None,
) -> list[Sample]:
    started = time.perf_counter()
    # padded by hand: a tokenizer without a padding token pads nothing, and what is masked may be
    # any token
    tokens = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    ids = pad_sequence(
        tokens, batch_first=True, padding_value=config.pad_token_id, padding_side="left"
    ).to(model.device)
    seen = pad_sequence(
        [torch.ones_like(row) for row in tokens], batch_first=True, padding_side="left"
    ).to(model.device)
    criteria = StoppingCriteriaList([stop] if stop else [])
    with generating_by(model, config):
        output = model.generate(
            ids,
            attention_mask=seen,
            generation_config=config,
            stopping_criteria=criteria,
            streamer=streamer,
        )
    continuations = output[:, ids.shape[1] :].tolist()  # waits for the device
    seconds = (time.perf_counter() - started) / len(prompts)
    lengths = stop.lengths if isinstance(stop, _WholeTexts) else {}
    samples = []
    for row, (prompt, of_prompt, written) in enumerate(
        zip(prompts, tokens, continuations, strict=True)
    ):
        written = written[: lengths.get(row)]  # what follows a whole text is padding
        place = next(
            (place for place, token in enumerate(written) if token in (config.eos_token_id or ())),
            len(written),
        )
        text, end = written[:place], written[place : place + 1]
        samples.append(
            Sample(
                prompt,
                _decode(tokenizer, text),
                tuple(of_prompt.tolist()),
                tuple(text),
                tuple(end),
                seconds,
            )
        )
    return samples


@contextlib.contextmanager
def generating_by(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Has `model.generate` obey `config` alone: transformers fills what it leaves at None from the
    model's own configuration.
    """
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def stopping(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    """Settings of `generate`: where a text ends, and what follows it in a batch whose other texts
    go on.
    """
    stops = stop_ids(model, tokenizer)
    padding = next((token for token in (tokenizer.pad_token_id, *stops) if token is not None), 0)
    return {"eos_token_id": stops or None, "pad_token_id": padding}


def _generation_config(
    sampling: Sampling, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    common = {
        "max_new_tokens": sampling.max_new_tokens,
        "repetition_penalty": sampling.repetition_penalty,
        "use_cache": True,
        **stopping(model, tokenizer),
    }
    if sampling.temperature == 0:
        return GenerationConfig(do_sample=False, **common)
    return GenerationConfig(
        do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0, **common
    )


def _seed(device: torch.device, seed: int) -> None:
    """Seeds only the generators that `fork_rng` gives back: torch.manual_seed would reseed every
    other device for good.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


class Gallery:
    """Prompts in bold, each followed by its continuation; HTML in a notebook, plain
    text elsewhere.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = list(samples)

    def _repr_html_(self) -> str:
        blocks = (
            '<p style="white-space: pre-wrap; margin: 0 0 1.2em'
            f' 0"><b>{html.escape(sample.prompt)}</b>{html.escape(sample.text)}'
            f" <small>[{_ending(sample)}]</small></p>"
            for sample in self.samples
        )
        return f'<div style="max-width: 60em; text-align: left">{"".join(blocks)}</div>'

    def __repr__(self) -> str:
        return "\n\n".join(
            f"> {sample.prompt}|{sample.text} [{_ending(sample)}]" for sample in self.samples
        )


def _ending(sample: Sample) -> str:
    return "end" if sample.ended else f"cut at {len(sample.tokens)} tokens"
