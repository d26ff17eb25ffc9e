from __future__ import annotations

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kl3m_nb.model import decoder, folder, roles
from kl3m_nb.model.experts import use_grouped_experts
from kl3m_nb.optim.objective import activation_penalty, chunked_objective
from kl3m_nb.optim.rules import build_optimizers, role_table
from kl3m_nb.profiles import get_profile
from tests.conftest import small_profile
from tests.model.test_experts import switch_loss


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("kl3m-006-170m", 181_700_928),
        ("kl3m-007-500m", 500_309_568),
        ("kl3m-002-520m", 520_193_024),
    ],
)
def test_real_models_have_the_published_number_of_parameters(name, parameters):
    counts = roles.parameter_counts(decoder.build_model(get_profile(name), device="meta"))
    assert counts["total"] == parameters
    assert sum(count for component, count in counts.items() if component != "total") == parameters


def test_the_same_seed_gives_the_same_weights_and_leaves_the_callers_random_state():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = decoder.build_model(small_profile()), decoder.build_model(small_profile())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


@pytest.mark.parametrize("experts", [0, 4])
def test_the_forward_pass_without_a_head_is_the_models_own(experts):
    profile = small_profile(
        experts=experts, active_experts=min(2, experts), sliding_window=16 if experts else 0
    )
    model = decoder.build_model(profile)
    inputs = torch.randint(0, 512, (2, 32))
    body = decoder.forward_body(model, inputs)
    reference = model(input_ids=inputs)
    assert body.expert_counts.shape == (
        (2, 4) if experts else (0, 0)
    ) and body.expert_counts.sum() == 2 * 2 * 64 * bool(experts)
    torch.testing.assert_close(model.lm_head(body.hidden), reference.logits)
    torch.testing.assert_close(model.model.norm(body.residual), body.hidden)
    assert (body.router_loss.item() > 0) == bool(experts)


def _documents(borders: str) -> dict[str, torch.Tensor]:
    """What `forward_body` is given for two windows of 32, beside the tokens; the second row has 9 +
    4 positions of padding.
    """
    mask = torch.ones(2, 32, dtype=torch.bool)
    mask[1, :9] = mask[1, 28:] = False
    positions = torch.cat([torch.arange(20), torch.arange(12)]).expand(2, 32)
    return {
        "full": {},
        "padded": {"attention_mask": mask},
        "documents": {"position_ids": positions, "document_ids": (positions == 0).cumsum(1)},
    }[borders]


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("borders", ["full", "padded", "documents"])
@pytest.mark.parametrize("recompute", [False, True])
def test_outputs_and_gradients_are_those_of_transformers_own_forward(
    experts, attention, borders, recompute
):
    profile = small_profile(
        experts=experts, active_experts=min(2, experts), sliding_window=16 if experts else 0
    )
    model = decoder.build_model(profile, attention=attention)
    inputs, given = torch.randint(0, 512, (2, 32)), _documents(borders)
    valid = given.get("attention_mask", torch.ones(2, 32, dtype=torch.bool))
    body = decoder.forward_body(model, inputs, **given, recompute=recompute)
    own = {
        name: value for name, value in given.items() if name != "document_ids"
    }  # transformers finds them in the positions
    reference = model.model(
        inputs, **own, use_cache=False, **({"output_router_logits": True} if experts else {})
    )
    router = torch.zeros(())
    if experts:
        router = (
            sum(
                switch_loss(logits[valid.flatten()], active=2) for logits in reference.router_logits
            )
            / 2
        )
    results = []
    for hidden, loss in ((body.hidden, body.router_loss), (reference.last_hidden_state, router)):
        (hidden[valid].square().mean() + loss).backward()
        results.append(
            (
                hidden[valid].detach(),
                loss.detach(),
                [parameter.grad for parameter in model.parameters()],
            )
        )
        model.zero_grad()
    torch.testing.assert_close(*results)
    assert torch.isfinite(body.hidden).all()


@pytest.mark.parametrize("experts", [0, 4])
def test_no_row_of_the_mask_is_empty(experts):
    """cuDNN and others make NaN of a softmax over nothing, and one NaN times zero is a NaN in every
    gradient.
    """
    model = decoder.build_model(
        small_profile(
            experts=experts, active_experts=experts // 2, sliding_window=16 if experts else 0
        )
    )
    seen = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(
            lambda *arguments: seen.append(arguments[2]["attention_mask"]), with_kwargs=True
        )
    decoder.forward_body(model, torch.randint(0, 512, (2, 32)), **_documents("padded"))
    assert len(seen) == 2 and seen[0] is seen[1], "built once for all blocks"
    assert seen[0].any(-1).all() and seen[0].tril().equal(seen[0])


@pytest.mark.parametrize("experts", [0, 4])
def test_checkpointing_keeps_less_and_computes_the_same(tmp_path, experts):
    """Of a model from the disk, which transformers gives in evaluation mode, as of a new one."""
    profile = small_profile(experts=experts, active_experts=experts // 2)
    decoder.build_model(profile).save_pretrained(tmp_path)
    inputs = torch.randint(0, 512, (2, 32))
    for model in (decoder.build_model(profile), decoder.load_model(tmp_path)):
        kept, gradients = [], []
        for recompute in (False, True):
            kept.append([])

            def keep(tensor, into=kept[-1]):
                into.append(tensor)
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                body = decoder.forward_body(model, inputs, recompute=recompute)
            (body.hidden.square().mean() + body.router_loss).backward()
            gradients.append([parameter.grad for parameter in model.parameters()])
            model.zero_grad()
        assert len(kept[1]) < len(kept[0]) / 2
        torch.testing.assert_close(gradients[1], gradients[0])


def test_nothing_of_a_pass_outlives_it():
    """Router logits that a recomputation leaves behind would keep all activations of their blocks
    until the next step.
    """
    model = decoder.build_model(small_profile(experts=4, active_experts=2))
    body = decoder.forward_body(model, torch.randint(0, 512, (2, 32)), recompute=True)
    (body.hidden.square().mean() + body.router_loss).backward()
    assert all(layer.mlp.gate.logits is None for layer in model.model.layers)


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_position_sees_those_before_it_and_no_farther_than_the_window(experts, attention):
    profile = small_profile(
        layers=1,
        experts=experts,
        active_experts=min(2, experts),
        sliding_window=8 if experts else 0,
    )
    model = decoder.build_model(profile, attention=attention)
    embedded = model.get_input_embeddings().register_forward_hook(
        lambda *arguments: arguments[-1].requires_grad_().retain_grad()
    )
    inputs, seen = torch.randint(0, 512, (1, 32)), []
    model.get_input_embeddings().register_forward_hook(
        lambda *arguments: seen.append(arguments[-1])
    )
    decoder.forward_body(model, inputs).hidden[0, 20].sum().backward()
    embedded.remove()
    reached = seen[0].grad[0].abs().sum(-1).nonzero().flatten().tolist()
    assert reached == list(range(13 if experts else 0, 21))


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("borders", ["full", "padded", "documents"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_never_reads_a_number_back(monkeypatch, experts, borders, recompute):
    """On a GPU each of these would make the host wait for all that is queued."""
    profile = small_profile(
        experts=experts, active_experts=min(2, experts), sliding_window=16 if experts else 0
    )
    model = decoder.build_model(profile)
    use_grouped_experts(model)
    inputs, given = torch.randint(0, 512, (2, 32)), _documents(borders)
    labels = inputs.masked_fill(~given["attention_mask"], -100) if borders == "padded" else inputs
    muon, aux = build_optimizers(model, role_table(model, profile), profile)
    monkeypatch.setattr(
        torch.Tensor, "is_cuda", property(lambda tensor: True)
    )  # the objective counts on a CPU only
    for step in range(2):
        counts = [
            state["step"] for state in aux.state.values()
        ]  # AdamW's own, which stay on the host
        with _ReadBacks(on_host=counts) as read_backs:
            body = decoder.forward_body(model, inputs, **given, recompute=recompute)
            terms = chunked_objective(
                body.hidden,
                model.get_output_embeddings().weight,
                labels,
                profile.objective,
                num_valid=64,
            )
            (
                terms.total + activation_penalty(body.residual, labels, 0.1, 64) + body.router_loss
            ).backward()
            if step:
                muon.step()
                aux.step()
                muon.movement_bounds()
            assert not read_backs.found
            bool(body.hidden.sum() > 0)
        assert read_backs.found == ["_local_scalar_dense"], "the watch itself works"
        muon.step()
        aux.step()


class _ReadBacks(TorchDispatchMode):
    """Notes every operation whose result the host has to know before it can go on."""

    def __init__(self, on_host=()):
        super().__init__()
        self.found, self.on_host = [], on_host

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if any(args[:1] and args[0] is tensor for tensor in self.on_host):
            return function(*args, **(kwargs or {}))
        if name in (
            "_local_scalar_dense",
            "nonzero",
            "equal",
            "masked_select",
            "bincount",
            "_unique2",
        ):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["tiny", "tiny-moe", "kl3m-007-500m", "kl3m-002-520m"])
def test_every_parameter_is_in_exactly_one_optimizer_group(name):
    profile = get_profile(name)
    model = decoder.build_model(profile, device="meta")
    rules = role_table(model, profile)
    muon, aux = build_optimizers(model, rules, profile)
    grouped = [
        id(parameter)
        for optimizer in (muon, aux)
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    assert {rule.name for rule in rules} == {
        parameter_name for parameter_name, _ in model.named_parameters()
    }


def test_the_role_table_follows_the_card():
    profile = get_profile("kl3m-007-500m")
    rules = {
        rule.name: rule for rule in role_table(decoder.build_model(profile, device="meta"), profile)
    }
    query, key, up = (
        rules[f"model.layers.7.{name}.weight"]
        for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
    )
    assert (
        query.lr / profile.muon_lr == 0.5
        and key.lr / profile.muon_lr == 0.75
        and up.lr == profile.muon_lr
    )
    assert query.max_condition == 3000 and up.max_condition == 2000 and query.weight_decay == 1e-5
    head = rules["model.embed_tokens.weight"]
    assert (head.role, head.optimizer, head.weight_decay, head.max_condition) == (
        "lm_head",
        "adamw",
        1e-3,
        2000,
    )
    assert head.lr == pytest.approx(0.9 * 5e-4)
    norm = rules["model.norm.weight"]
    assert (norm.role, norm.optimizer, norm.weight_decay, norm.max_condition) == (
        "norm",
        "adamw",
        0.0,
        0.0,
    )


def test_a_mixtral_has_experts_router_and_an_embedding_of_its_own():
    found = roles.parameter_roles(decoder.build_model(get_profile("tiny-moe"), device="meta"))
    assert {"gate_up_proj", "down_proj", "router", "embedding", "lm_head", "norm", "q_proj"} <= set(
        found.values()
    )


def test_a_parameter_without_a_role_is_an_error():
    model = decoder.build_model(small_profile())
    model.model.layers[0].extra = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"extra\.weight"):
        roles.parameter_roles(model)


def test_broken_checkpoints_are_named(tmp_path, trained_run):
    _, result = trained_run
    with pytest.raises(ValueError, match="no checkpoint folder"):
        decoder.load_model(tmp_path / "nothing")
    with pytest.raises(
        ValueError, match=r"no checkpoint folder /\S+/nobody/nothing, and the hub gave no model"
    ) as caught:
        decoder.load_model("nobody/nothing")
    assert "\n" not in str(caught.value)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"config\.json"):
        decoder.load_model(empty)
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "config.json").write_text((result.checkpoint / "config.json").read_text())
    with pytest.raises(ValueError, match=r"\.safetensors"):
        decoder.load_model(cut)
    whole = (result.checkpoint / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut off or damaged"):
        decoder.load_model(cut)
    (cut / "model.safetensors").write_bytes(whole)
    for text in ("{", "[]", "\xff"):
        (cut / "config.json").write_text(text, encoding="latin-1")
        with pytest.raises(
            ValueError, match=r"cut/config\.json (is not JSON|holds no JSON object)"
        ):
            decoder.load_model(cut)
    (cut / "config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"The checkpoint \S+/cut cannot be loaded \(Unrecognized model"
    ):
        decoder.load_model(cut)
    (cut / "model.safetensors").unlink()
    for text in ("{", "{}"):
        (cut / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match=r"cut/model\.safetensors\.index\.json (is|has)"):
            folder.weight_files(cut)


def test_a_checkpoint_of_another_shape_is_refused_by_its_first_difference(trained_run):
    _, result = trained_run
    config = json.loads((result.checkpoint / "config.json").read_text())
    decoder.check_fits(config, small_profile(), result.checkpoint)
    with pytest.raises(ValueError, match="num_hidden_layers 2"):
        decoder.check_fits(config, small_profile(layers=4), result.checkpoint)
    with pytest.raises(ValueError, match="tie_word_embeddings True, the profile tiny wants False"):
        decoder.check_fits(config, small_profile(tied_embeddings=False), result.checkpoint)
    with pytest.raises(ValueError, match="rope_theta 100000"):
        decoder.check_fits(config, small_profile(rope_theta=10_000.0), result.checkpoint)


def test_the_config_of_an_older_transformers_fits_as_well(trained_run):
    _, result = trained_run
    config = json.loads((result.checkpoint / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    del config["head_dim"]
    decoder.check_fits(config, small_profile(), result.checkpoint)
