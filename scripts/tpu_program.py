"""Compile a configuration's training step for TPUs that are not there, and say what it does.

    python scripts/tpu_program.py CONFIG topology=v5e:4x4 [key=value ...] [--dump PROGRAM.txt]

The step is the one that `peft-jax train` would compile; of `model.path` only `config.json` is read.
The compiler for TPUs comes with `pip install libtpu`; no TPU is needed. `topology` is a name of
jax.experimental.topologies, as v5e:2x2, v5p:4x4x4, v6e:16x16; `segments=false` is for rows of one
text each.
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", help="a YAML file, or none to go by the overrides alone")
    parser.add_argument("overrides", nargs="*", help="topology=..., segments=false, key=value ...")
    parser.add_argument("--dump", help="a file for the text of the program")
    parser.add_argument("--rows", type=int, default=12, help="collectives to show")
    arguments = parser.parse_args()
    own = {"topology": "v5e:2x2", "segments": "true"}
    given = dict(o.split("=", 1) for o in arguments.overrides if o.split("=", 1)[0] in own)
    overrides = [o for o in arguments.overrides if o.split("=", 1)[0] not in own]
    own |= given

    from peft_jax.recipes.config import load_config
    from peft_jax.recipes.program import compiled_for, describe_program

    config = load_config(arguments.config, overrides)
    start = time.time()
    program = compiled_for(config, own["topology"], segments=own["segments"] == "true")
    print(describe_program(program, rows=arguments.rows))
    print(f"planned and compiled in {time.time() - start:.0f} s")
    if arguments.dump:
        with open(arguments.dump, "w") as file:
            file.write(program.text)


if __name__ == "__main__":
    main()
