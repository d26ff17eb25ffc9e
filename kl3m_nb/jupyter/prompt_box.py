"""A prompt box in a notebook: two checkpoints side by side, sampling sliders, streaming text, token
probabilities on hover.

Where nobody can click (a batch job, papermill, an HTML page) the same object shows a fixed gallery
instead, so a notebook needs no second cell. Text is written in a thread of its own: the sliders
stay alive and a click stops it.

The probabilities shown of each token are the model's plain ones (temperature 1, nothing cut off),
whatever the sampling that drew the tokens.
"""

from __future__ import annotations

import html
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import ipywidgets as widgets
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kl3m_nb.evaluation.generation import Sample, Sampling, generate, generate_streaming
from kl3m_nb.jupyter.progress import PROGRESS_VARIABLE
from kl3m_nb.model.logits import before_head
from kl3m_nb.model.scoring import evaluation_mode, head_logits

GALLERY_TOKENS = 40


# set by a Jupyter server in the kernels of its notebooks, and by nobody else
SERVER_VARIABLE = "JPY_SESSION_NAME"


class PromptBox:
    """Shows itself as the value of a notebook cell: `PromptBox(models, tokenizers, prompts,
    sampling, seed)`.

    `models` and `tokenizers` map the same labels; the last two stand side by side at first. The
    gallery continues `prompts` with both, each by up to 40 tokens. Raises ValueError without a
    model or a prompt, and for labels that differ.
    """

    def __init__(
        self,
        models: Mapping[str, PreTrainedModel],
        tokenizers: Mapping[str, PreTrainedTokenizerBase],
        prompts: Sequence[str],
        sampling: Sampling,
        seed: int,
    ) -> None:
        if not models or list(models) != list(tokenizers):
            raise ValueError(
                "A prompt box needs one tokenizer for each of at least one model; given are"
                f" {', '.join(models)}."
            )
        if not prompts:
            raise ValueError("A prompt box was given no prompts; its gallery needs at least one.")
        self.models, self.tokenizers, self.prompts = models, tokenizers, list(prompts)
        self.sampling, self.seed = sampling, seed
        self._stop = threading.Event()
        self.thread = threading.Thread()
        self._build()

    def _build(self) -> None:
        names = list(self.models)
        wide = {"layout": widgets.Layout(width="24em"), "style": {"description_width": "9em"}}
        self.prompt = widgets.Textarea(
            self.prompts[0], layout=widgets.Layout(width="auto", height="5em")
        )
        self.temperature = widgets.FloatSlider(
            self.sampling.temperature, min=0, max=2, step=0.05, description="temperature", **wide
        )
        self.top_p = widgets.FloatSlider(
            self.sampling.top_p, min=0.05, max=1, step=0.05, description="top-p", **wide
        )
        self.penalty = widgets.FloatSlider(
            self.sampling.repetition_penalty,
            min=1,
            max=2,
            step=0.05,
            description="repetition penalty",
            **wide,
        )
        self.length = widgets.IntSlider(
            self.sampling.max_new_tokens, min=1, max=512, description="new tokens", **wide
        )
        self.seed_field = widgets.IntText(self.seed, description="seed", **wide)
        self.write_button = widgets.Button(description="Write", button_style="primary")
        self.stop_button = widgets.Button(description="Stop", disabled=True)
        self.choosers = [
            widgets.Dropdown(options=names, value=name)
            for name in (names[-2:] if len(names) > 1 else names)
        ]
        self.texts = [widgets.HTML() for _ in self.choosers]
        self.states = [
            widgets.HTML() for _ in self.choosers
        ]  # a Label would cut a long sentence off
        self.write_button.on_click(lambda _: self.write())
        self.stop_button.on_click(lambda _: self._stop.set())
        columns = [
            widgets.VBox(
                [chooser, text, state], layout=widgets.Layout(width="50%", padding="0 1em 0 0")
            )
            for chooser, text, state in zip(self.choosers, self.texts, self.states, strict=True)
        ]
        sliders = [
            widgets.HBox([self.temperature, self.top_p]),
            widgets.HBox([self.penalty, self.length]),
        ]
        buttons = widgets.HBox([self.write_button, self.stop_button, self.seed_field])
        self.view = widgets.VBox([self.prompt, *sliders, buttons, widgets.HBox(columns)])

    def write(self) -> threading.Thread:
        """Begins to write with the settings as they stand, one model after the other; returns the
        thread that does.
        """
        if self.thread.is_alive():
            return self.thread
        self._stop.clear()
        self.write_button.disabled, self.stop_button.disabled = True, False
        self.thread = threading.Thread(target=self._write, daemon=True)
        self.thread.start()
        return self.thread

    def _write(self) -> None:
        prompt, seed = self.prompt.value, self.seed_field.value
        for shown in (*self.texts, *self.states):
            shown.value = ""
        try:
            sampling = Sampling(
                self.temperature.value, self.top_p.value, self.penalty.value, self.length.value
            )
            for chooser, text, state in zip(self.choosers, self.texts, self.states, strict=True):
                if not self._stop.is_set():
                    self._write_one(chooser.value, prompt, sampling, seed, text, state)
        # a prompt too long, say: the sentence belongs in the box, not in the log of a thread
        except ValueError as error:
            state.value = html.escape(str(error))
        finally:
            self.write_button.disabled, self.stop_button.disabled = False, True

    def _write_one(
        self,
        name: str,
        prompt: str,
        sampling: Sampling,
        seed: int,
        text: widgets.HTML,
        state: widgets.HTML,
    ) -> None:
        model, tokenizer = self.models[name], self.tokenizers[name]

        def show(written: str) -> None:
            text.value = (
                '<div style="white-space:'
                f' pre-wrap"><b>{html.escape(prompt)}</b>{html.escape(written)}</div>'
            )

        state.value = "writing …"
        sample = generate_streaming(
            model, tokenizer, prompt, sampling, seed, show, self._stop.is_set
        )
        text.value = choices_html(prompt, token_choices(model, tokenizer, sample))
        state.value = f"{_length(sample)}, {_speed([sample])}"

    @cached_property
    def gallery(self) -> str:
        """The fixed gallery as HTML: every prompt continued by the chosen models side by side,
        probabilities on hover.
        """
        sampling = Sampling(
            self.sampling.temperature,
            self.sampling.top_p,
            self.sampling.repetition_penalty,
            min(GALLERY_TOKENS, self.sampling.max_new_tokens),
        )
        names = [chooser.value for chooser in self.choosers]
        columns = [
            generate(self.models[name], self.tokenizers[name], self.prompts, sampling, self.seed)
            for name in names
        ]
        cell = "vertical-align: top; text-align: left; width: 50%; padding: 0.5em 1em 0.5em 0"
        heads = "".join(
            f'<th style="{cell}">{html.escape(name)} <small>{_speed(samples)}</small></th>'
            for name, samples in zip(names, columns, strict=True)
        )
        rows = ""
        for samples in zip(*columns, strict=True):
            cells = (
                f'<td style="{cell}">'
                + choices_html(
                    sample.prompt, token_choices(self.models[name], self.tokenizers[name], sample)
                )
                + f"<small>{_length(sample)}</small></td>"
                for name, sample in zip(names, samples, strict=True)
            )
            rows += f"<tr>{''.join(cells)}</tr>"
        return f'<table style="width: 100%; table-layout: fixed"><tr>{heads}</tr>{rows}</table>'

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict:
        """The widget for a live notebook, the gallery for everything that is only looked at.

        What a batch job saves holds no state of the widget, and its view would be an error message.
        """
        bundle = {"text/plain": f"PromptBox of {', '.join(self.models)}", "text/html": self.gallery}
        is_live = SERVER_VARIABLE in os.environ and PROGRESS_VARIABLE not in os.environ
        return (self.view._repr_mimebundle_() if is_live else {}) | bundle


def _length(sample: Sample) -> str:
    return f"{len(sample.tokens)} tokens, {'ended by itself' if sample.ended else 'cut'}"


def _speed(samples: Sequence[Sample]) -> str:
    """Tokens a second over one call, the end-of-text tokens included: they cost as much as any."""
    tokens = sum(len(sample.tokens) + sample.ended for sample in samples)
    return f"{tokens / sum(sample.seconds for sample in samples):,.0f} tokens/s"


ALTERNATIVES = 5


@dataclass(frozen=True)
class TokenChoice:
    """One token of a continuation: its text, probability and rank (1 is the likeliest), and the
    likeliest tokens in its place.
    """

    text: str
    probability: float
    rank: int
    alternatives: tuple[tuple[str, float], ...]  # text and probability, the likeliest first


@torch.no_grad()
def token_choices(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: Sample
) -> list[TokenChoice]:
    """What `model` gave each token of `sample`, the end-of-text token included where it was
    written.
    """
    drawn = [*sample.tokens, *sample.end_tokens]
    ids = torch.tensor([[*sample.prompt_tokens, *drawn]], device=model.device)
    with evaluation_mode(model):
        states, head = before_head(model, ids[:, :-1])
        probabilities = head_logits(states[0, -len(drawn) :], head).softmax(dim=-1).cpu()
    choices = []
    for token, distribution in zip(drawn, probabilities, strict=True):
        best = distribution.topk(ALTERNATIVES)
        choices.append(
            TokenChoice(
                text=tokenizer.decode([token]),
                probability=distribution[token].item(),
                rank=1 + int((distribution > distribution[token]).sum()),
                alternatives=tuple(
                    zip(
                        map(tokenizer.decode, best.indices[:, None].tolist()),
                        best.values.tolist(),
                        strict=True,
                    )
                ),
            )
        )
    return choices


def choices_html(prompt: str, choices: Sequence[TokenChoice]) -> str:
    """The prompt in bold, then every token on a tint as strong as its probability, its figures as
    its tooltip.
    """
    spans = "".join(
        f'<span title="{html.escape(_tooltip(choice))}" style="background: rgba(0, 114, 178,'
        f' {0.5 * choice.probability:.3f})">{html.escape(choice.text)}</span>'
        for choice in choices
    )
    return (
        '<div style="white-space: pre-wrap; text-align: left; line-height:'
        f' 1.6"><b>{html.escape(prompt)}</b>{spans}</div>'
    )


def _tooltip(choice: TokenChoice) -> str:
    others = "\n".join(f"{probability:6.1%}  {text!r}" for text, probability in choice.alternatives)
    return f"{choice.text!r}: {choice.probability:.2%}, rank {choice.rank:,}\n{others}"
