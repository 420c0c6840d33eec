"""What is read from a compiled program's text, against programs of known work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from peft_jax.core.mesh import make_mesh
from peft_jax.core.program import read_program


def test_a_loop_s_products_and_collectives_count_as_often_as_it_turns():
    mesh = make_mesh({"fsdp": 8})
    layers = jax.device_put(np.ones((5, 64, 32), np.float32), NamedSharding(mesh, P(None, "fsdp")))
    x = jax.device_put(np.ones((16, 64), np.float32), NamedSharding(mesh, P("fsdp")))

    def run(layers, x):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
            return jnp.tanh(x @ w) @ w.T, None

        return jax.lax.scan(layer, x, layers)[0]

    program = read_program(jax.jit(run).lower(layers, x).compile().as_text())
    assert program.flops == 5 * 2 * (2 * 2 * 64 * 32)  # 2 rows a device, 2 products a layer
    (gather,) = program.collectives
    assert (gather.kind, gather.size, gather.times) == ("all-gather", 64 * 32 * 4, 5)
    assert program.moved == 5 * 64 * 32 * 4
    assert not program.kernels


TEXT = """HloModule jit_step

%start (p: bf16[1,128]) -> bf16[1,512] {
  %p = bf16[1,128]{1,0} parameter(0)
  ROOT %gather.1 = bf16[1,512]{1,0} all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4]
}

%overlapped (p: bf16[1,128]) -> bf16[1,512] {
  %p.1 = bf16[1,128]{1,0} parameter(0)
  ROOT %gather.2 = bf16[1,512]{1,0} all-gather(%p.1), channel_id=7, replica_groups=[1,4]<=[4]
}

%condition (c: (u32[], bf16[1,128])) -> pred[] {
  %c = (u32[], bf16[1,128]{1,0}) parameter(0)
  %i = u32[] get-tuple-element(%c), index=0
  %end = u32[] constant(8)
  ROOT %lt = pred[] compare(%i, %end), direction=LT
}

%body (c: (u32[], bf16[1,128])) -> (u32[], bf16[1,128]) {
  %c.1 = (u32[], bf16[1,128]{1,0}) parameter(0)
  %i.1 = u32[] get-tuple-element(%c.1), index=0
  %two = u32[] constant(2)
  %next = u32[] add(%i.1, %two)
  %x = bf16[1,128]{1,0} get-tuple-element(%c.1), index=1
  %sent = bf16[1,128]{1,0} collective-permute(%x), channel_id=9, source_target_pairs={{0,1},{1,0}}
  %step = bf16[1,512]{1,0} fusion(%sent), kind=kCustom, calls=%overlapped
  ROOT %out = (u32[], bf16[1,128]{1,0}) tuple(%next, %sent)
}

ENTRY %main (a: bf16[1,128], l: bf16[16,1,64], r: bf16[64,2,32]) -> bf16[16,2,32] {
  %a = bf16[1,128]{1,0} parameter(0)
  %l = bf16[16,64,1]{1,0,2} parameter(1)
  %r = bf16[64,2,32]{2,1,0} parameter(2)
  %g = bf16[1,512]{1,0} fusion(%a), kind=kCustom, calls=%start
  %zero = u32[] constant(0)
  %init = (u32[], bf16[1,128]{1,0}) tuple(%zero, %a)
  %loop = (u32[], bf16[1,128]{1,0}) while(%init), condition=%condition, body=%body
  %k = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call"
  ROOT %conv = bf16[16,2,32]{2,1,0} convolution(%l, %r), WINDOW
}
""".replace("WINDOW", "window={size=2 pad=1_1 rhs_reversal=1}, dim_labels=bf0_i0o->b0f")


def test_what_a_tpu_s_program_repeats_is_counted_once():
    """An asynchronous collective's later instructions have its channel, a window's loop moves its
    counter by two, and what meets padding is no product.
    """
    program = read_program(TEXT)
    counted = {(c.kind, c.size, c.times) for c in program.collectives}
    assert counted == {("all-gather", 1024, 1), ("collective-permute", 256, 4)}
    assert program.flops == 2 * 16 * 64 * 2 * 32
    assert program.kernels == {"tpu_custom_call": 1}


@pytest.mark.parametrize("groups", ["{{0},{1}}", "{{0}}"])
def test_a_collective_of_one_device_moves_nothing(groups):
    line = f"  ROOT %s = f32[8]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%add\n"
    text = "ENTRY %main (p: f32[8]) -> f32[8] {\n  %p = f32[8]{0} parameter(0)\n" + line + "}\n"
    assert not read_program(text).collectives
