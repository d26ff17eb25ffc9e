from __future__ import annotations

import sys
import types

import pytest
import torch
from torch.nn.attention import SDPBackend
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from kl3m_nb.common import distributed
from kl3m_nb.model import decoder, runtime
from kl3m_nb.model.costs import USABLE, step_memory
from kl3m_nb.model.flash_attention import IMPLEMENTATION
from kl3m_nb.model.fused_projections import fuse_projections
from kl3m_nb.profiles import get_profile
from tests.conftest import small_profile


@pytest.fixture
def gpu(monkeypatch):
    """A make-believe H200 with flash-attn installed, and without flash-attn-4; its parts can be
    changed.
    """
    parts = {"capability": (9, 0), "bytes": 141 * 10**9, "flash-attn-4": False}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported",
        lambda including_emulation=True: including_emulation or parts["capability"] >= (8, 0),
    )
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: parts["capability"])
    monkeypatch.setattr(runtime, "device_memory", lambda device: parts["bytes"])
    monkeypatch.setattr(runtime, "_sdpa_kernel", lambda *arguments: "cudnn_attention")
    package = types.ModuleType("flash_attn")
    package.flash_attn_func = None
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(runtime.flash_attention, "loads", lambda: parts["flash-attn-4"])
    return parts


def test_a_cpu_computes_in_float32_uncompiled():
    chosen = runtime.choose_runtime(get_profile("tiny"))
    if chosen.device.type == "cpu":
        assert (chosen.precision, chosen.attention, chosen.compile_blocks, chosen.tf32) == (
            "float32",
            "sdpa",
            False,
            False,
        )
    assert not chosen.recompute and "no gradient checkpointing" in chosen.describe()


def test_a_large_gpu_gets_everything_that_is_fast(gpu):
    chosen = runtime.choose_runtime(get_profile("kl3m-007-500m"))
    assert (chosen.precision, chosen.attention, chosen.compile_blocks) == ("bfloat16", "sdpa", True)
    assert chosen.tf32 and not chosen.recompute


def test_attention_follows_the_gpu_the_window_and_the_mask(gpu):
    def chosen(name, **overrides):
        return runtime.choose_runtime(get_profile(name, **overrides)).attention

    assert chosen("kl3m-002-520m", packing="dense", p_sft=0.0) == "flash_attention_2"
    assert chosen("kl3m-002-520m") == "sdpa", (
        "segments are padded, and their mask costs FlashAttention a host sync a layer"
    )
    gpu["capability"] = (8, 0)
    assert chosen("kl3m-007-500m") == "flash_attention_2"
    assert chosen("kl3m-007-500m", document_borders="mask") == "sdpa"
    assert (
        chosen("kl3m-007-500m", attention="sdpa")
        == chosen("kl3m-007-500m", precision="float32")
        == "sdpa"
    )


def test_flash_attention_2_refuses_what_would_mix_documents(gpu):
    asked = {"attention": "flash_attention_2", "document_borders": "mask"}
    with pytest.raises(ValueError, match="micro_batch is 5; choose"):
        runtime.choose_runtime(get_profile("kl3m-007-500m", **asked))
    assert (
        runtime.choose_runtime(get_profile("kl3m-007-500m", micro_batch=1, **asked)).attention
        == "flash_attention_2"
    )


def test_shards_that_fit_are_not_recomputed(gpu, monkeypatch):
    profile = get_profile("kl3m-007-500m", parallel="fsdp")
    whole, shard = (
        step_memory(profile, "bfloat16", True, False, shards).total for shards in (1, 8)
    )
    gpu["bytes"] = (whole + shard) / 2 / USABLE
    assert runtime.choose_runtime(profile).recompute
    monkeypatch.setattr(distributed, "world", lambda: distributed.World(0, 8))
    assert not runtime.choose_runtime(profile).recompute
    assert runtime.choose_runtime(get_profile("kl3m-007-500m")).recompute, (
        "every process holds the whole model"
    )


def test_flash_attention_4_is_taken_on_hopper_where_nothing_is_masked(gpu):
    def chosen(name="kl3m-007-500m", **overrides):
        return runtime.choose_runtime(get_profile(name, **overrides)).attention

    with pytest.raises(ValueError, match="flash-attn-4 package that loads"):
        chosen(attention="flash_attention_4")
    gpu["flash-attn-4"] = True
    assert chosen(micro_batch=10) == chosen(attention="flash_attention_4") == IMPLEMENTATION
    assert (
        chosen(micro_batch=10, document_borders="mask")
        == chosen(micro_batch=10, attention="sdpa")
        == "sdpa"
    )
    assert chosen(micro_batch=5) == "sdpa", "its calls would keep the GPU waiting"
    described = runtime.Runtime(
        torch.device("cpu"), "bfloat16", chosen(micro_batch=10), False, False, False
    ).describe()
    assert "attention flash_attention_4 " in described
    assert chosen("kl3m-002-520m", packing="dense", p_sft=0.0) == "flash_attention_2", (
        "its window is shorter than a segment"
    )
    for refused in (
        {"document_borders": "mask"},
        {"name": "kl3m-002-520m", "packing": "dense", "p_sft": 0.0},
    ):
        with pytest.raises(ValueError, match="takes no mask and no sliding window"):
            chosen(attention="flash_attention_4", **refused)
    assert chosen(micro_batch=10, head_size=20) == "sdpa"
    with pytest.raises(ValueError, match="multiple of 8 up to 256, not 20"):
        chosen(attention="flash_attention_4", head_size=20)
    gpu["capability"] = (8, 0)
    assert chosen(micro_batch=10) == "flash_attention_2"
    with pytest.raises(ValueError, match="Hopper"):
        chosen(attention="flash_attention_4")


def test_flash_attn_4_alone_is_not_taken_for_flash_attn(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    gpu["capability"] = (8, 0)
    assert runtime.choose_runtime(get_profile("kl3m-007-500m")).attention == "sdpa"


def test_bfloat16_is_not_chosen_where_it_is_emulated(gpu):
    gpu["capability"] = (7, 5)
    chosen = runtime.choose_runtime(get_profile("kl3m-006-170m"))
    assert (chosen.precision, chosen.attention) == ("float32", "sdpa")


@pytest.mark.parametrize(
    "error", ["ImportError('undefined symbol: _ZN3c105Error')", "OSError('libcudart.so.11')", None]
)
def test_flash_attn_that_is_missing_or_does_not_load_is_done_without(
    gpu, monkeypatch, tmp_path, error
):
    monkeypatch.delitem(sys.modules, "flash_attn")
    if error:
        (tmp_path / "flash_attn.py").write_text(f"raise {error}")
        monkeypatch.syspath_prepend(tmp_path)
    gpu["capability"] = (8, 0)
    assert runtime.choose_runtime(get_profile("kl3m-007-500m")).attention == "sdpa"
    with pytest.raises(ValueError, match="flash-attn package that loads"):
        runtime.choose_runtime(get_profile("kl3m-007-500m", attention="flash_attention_2"))


@pytest.mark.parametrize(("overrides", "masked"), [({}, False), ({"packing": "segments"}, True)])
def test_the_kernel_is_asked_for_with_the_shapes_of_the_run(monkeypatch, overrides, masked):
    asked = []

    def choice(query, key, value, mask, is_causal, enable_gqa):
        asked.append(
            (
                tuple(query.shape),
                tuple(key.shape),
                mask is not None,
                is_causal,
                enable_gqa,
                query.requires_grad,
            )
        )
        return int(SDPBackend.CUDNN_ATTENTION.value)

    monkeypatch.setattr("torch._fused_sdp_choice", choice)
    chosen = runtime.choose_runtime(small_profile(**overrides))
    assert asked == [
        ((1, 4, 32, 8), (1, 4 if masked else 2, 32, 8), masked, not masked, not masked, True)
    ]
    assert "attention sdpa (cudnn_attention)" in chosen.describe()
    assert runtime.choose_runtime(small_profile(attention="eager")).kernel == "" and len(asked) == 1


def test_torch_tells_its_kernel():
    assert runtime.choose_runtime(small_profile()).kernel in {
        backend.lower() for backend in SDPBackend.__members__
    }


@pytest.mark.parametrize(
    ("asked", "on_large", "on_small"),
    [("auto", False, True), ("on", True, True), ("off", False, False)],
)
def test_gradient_checkpointing_only_where_memory_asks_for_it(gpu, asked, on_large, on_small):
    profile = get_profile("kl3m-007-500m", gradient_checkpointing=asked)
    assert runtime.choose_runtime(profile).recompute is on_large
    gpu["bytes"] = 24 * 10**9
    assert runtime.choose_runtime(profile).recompute is on_small


@pytest.mark.parametrize(("field", "value"), [("attention", "flash_attention_2"), ("tf32", "on")])
def test_what_a_machine_does_not_have_is_refused(monkeypatch, field, value):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=f"{field} .*choose auto"):
        runtime.choose_runtime(get_profile("tiny", **{field: value}))


def test_memory_is_bounded_by_what_a_job_may_use(tmp_path, monkeypatch):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(runtime, "_MEMORY_LIMIT", limit)
    installed = runtime.device_memory(torch.device("cpu"))
    limit.write_text("max\n")
    assert runtime.device_memory(torch.device("cpu")) == installed
    limit.write_text("1000000\n")
    assert runtime.device_memory(torch.device("cpu")) == 1_000_000


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_all_blocks_are_one_graph_that_computes_the_same(tmp_path, experts, padded, recompute):
    profile = small_profile(
        layers=3,
        experts=experts,
        active_experts=min(2, experts),
        sliding_window=16 if experts else 0,
    )
    decoder.build_model(profile).save_pretrained(tmp_path)
    inputs, mask = (
        torch.randint(0, 512, (2, 32)),
        torch.arange(32).expand(2, 32) > 4 if padded else None,
    )
    results, graphs = [], []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    for compiled in (False, True):
        model = decoder.load_model(tmp_path)
        if compiled:
            torch._dynamo.reset()
            fuse_projections(model)
            for layer in model.model.layers:
                layer.compile(dynamic=False, backend=backend, fullgraph=True)
        for _ in range(2):  # a second pass compiles nothing
            model.zero_grad()
            body = decoder.forward_body(model, inputs, mask, recompute=recompute)
            (body.hidden.square().mean() + body.router_loss).backward()
        results.append(
            (
                body.hidden.detach(),
                body.router_loss.detach(),
                [parameter.grad for parameter in model.parameters()],
            )
        )
    torch.testing.assert_close(results[1], results[0])
    assert len(graphs) == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_projections_are_fused_where_blocks_are_compiled(compiled):
    model = decoder.build_model(small_profile())
    runtime.prepare_model(
        model,
        runtime.Runtime(
            torch.device("cpu"), "float32", "sdpa", compiled, recompute=False, tf32=False
        ),
    )
    kinds = {
        type(module) for layer in model.model.layers for module in (layer.self_attn, layer.mlp)
    }
    assert (kinds == {LlamaAttention, LlamaMLP}) is not compiled
    assert {name for name, _ in model.named_parameters()} == {
        name for name, _ in decoder.build_model(small_profile()).named_parameters()
    }


@pytest.mark.parametrize(("count", "told"), [(1, "1 thread"), (2, "2 threads")])
def test_threads_are_told_in_their_number(monkeypatch, count, told):
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    described = runtime.Runtime(
        torch.device("cpu"), "float32", "sdpa", False, False, False
    ).describe()
    assert described.startswith(f"CPU, {told} · ") and runtime.versions().endswith(f", {told}")
