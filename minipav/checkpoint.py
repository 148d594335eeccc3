"""The state of a training in one safetensors file: weights, optimizers, the curve so far, numbers and log."""
import json

from minipav.files import damaged, read_tensors, write_tensors


def save(path, modules, optimizers, curve, state, rows):
    """modules {name: module}, optimizers {name: [its optimizers]}, curve (evaluations, problems)."""
    tensors = {"curve": curve}
    for name, module in modules.items():
        tensors |= {f"{name}.{k}": v for k, v in module.state_dict().items()}
        for j, opt in enumerate(optimizers[name]):
            tensors |= {f"opt.{name}.{j}.{p}.{k}": v for p, values in opt.state_dict()["state"].items()
                        for k, v in values.items()}
    write_tensors(path, tensors, {"state": json.dumps(state), "rows": json.dumps(rows)})


def load(path, modules, optimizers):
    """Put the saved state back. -> (curve, state, rows). Raises Fail if the file is not of this training."""
    tensors, meta = read_tensors(path, {"curve": 2})
    try:
        for name, module in modules.items():
            module.load_state_dict(below(tensors, f"{name}."))
            for j, opt in enumerate(optimizers[name]):
                state = {}
                for key, v in below(tensors, f"opt.{name}.{j}.").items():
                    p, k = key.split(".")
                    state.setdefault(int(p), {})[k] = v
                opt.load_state_dict(opt.state_dict() | {"state": state})
        state, rows = json.loads(meta["state"]), json.loads(meta["rows"])
        if len(rows) != len(tensors["curve"]) or rows[-1]["iteration"] != state["iteration"]:
            raise ValueError("its log and its state do not fit together")
        return tensors["curve"], state, rows
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as e:
        raise damaged(path, " ".join(str(e).split())) from None


def below(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
