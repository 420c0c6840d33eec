"""What every technique stands on: nodes, trees and binding. Knows JAX and Flax, and no
technique.
"""

from peft_jax.core.adapters import adapter_names, drop_adapters
from peft_jax.core.attachment import Attachment
from peft_jax.core.bank import bank, bank_adapter, clear_adapter, run_parallel, set_adapter
from peft_jax.core.bind import MissingRuleError, bind, layout_of, nnx_params, register_rule
from peft_jax.core.calibrate import calibrate, gradients
from peft_jax.core.capture import capture, input_of, output_of
from peft_jax.core.in_turn import output_errors
from peft_jax.core.merge import merge, unmerge
from peft_jax.core.mesh import make_mesh
from peft_jax.core.method import Method
from peft_jax.core.nodes import register_node
from peft_jax.core.partition import combine, count, freeze, full, partition
from peft_jax.core.registry import Registry
from peft_jax.core.roles import Roles, register_roles
from peft_jax.core.select import select
from peft_jax.core.sharding import shard, shardings
from peft_jax.core.tree import places
from peft_jax.core.weight import Trainable, Weight, einsum, materialize, matmul, take

__all__ = [
    "Attachment",
    "Method",
    "MissingRuleError",
    "Registry",
    "Roles",
    "Trainable",
    "Weight",
    "adapter_names",
    "bank",
    "bank_adapter",
    "bind",
    "calibrate",
    "capture",
    "clear_adapter",
    "combine",
    "count",
    "drop_adapters",
    "einsum",
    "freeze",
    "full",
    "gradients",
    "input_of",
    "layout_of",
    "make_mesh",
    "materialize",
    "matmul",
    "merge",
    "nnx_params",
    "output_errors",
    "output_of",
    "partition",
    "places",
    "register_node",
    "register_roles",
    "register_rule",
    "run_parallel",
    "select",
    "set_adapter",
    "shard",
    "shardings",
    "take",
    "unmerge",
]
