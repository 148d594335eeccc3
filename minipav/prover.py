"""The prover mu: best-of-K of a policy in closed form (Eq. 30), or another policy with its own Q^mu."""
import re
from pathlib import Path
from typing import NamedTuple

from minipav.files import file_checksum, read_json
from minipav.utils import Fail


def verifier_of(policy):
    """The name of the verifier of a policy's Q; a folder is its own."""
    return {"base": "q_pi", "weak": "q_weak", "strong": "q_strong"}.get(policy, policy)


def check_head(policy, head, flag="prover"):
    """Raises Fail if a prover that is a folder has not this head: "lm" to sample, "scalar" for values."""
    if verifier_of(policy) == policy and read_json(Path(policy) / "config.json", head=str)["head"] != head:
        raise Fail(f"--{flag} {policy}: is no {'verifier' if head == 'scalar' else 'policy'}")


def weights_of(prover):
    """What a result depends on beside the name of a prover that is a folder: the checksum of its weights."""
    path = Path(prover) / "model.safetensors"
    folder = prover and verifier_of(prover) == prover and path.is_file()
    return {"prover_weights": file_checksum(path)} if folder else {}


class Prover(NamedTuple):
    policy: str                     # "base", "weak", "strong", or a folder with a saved model
    K: int = 1

    @classmethod
    def parse(cls, text, base="base"):
        """"bo4" is best-of-4 of the policy `base` ("bo1" is pi itself), "weak" and "strong" are policies of
        train.py, and a folder holds a policy (for rollouts) or a verifier (of its Q). Else raises Fail."""
        if m := re.fullmatch(r"bo([1-9][0-9]{0,5})", text, re.ASCII):
            return cls(base, int(m[1]))
        if text in ("base", "weak", "strong"):
            return cls(text)
        if (Path(text) / "model.safetensors").is_file():
            return cls(str(Path(text).resolve()))
        raise Fail(f"--prover {text}: unknown; choose boK with K from 1 to 999999 (bo4), weak, strong, or "
                   "the folder of a saved model")
