"""The tasks by name. To add one: a file with a Task, and its line in TASKS."""
from minipav.flags import check
from minipav.tasks.calculator import Calculator
from minipav.tasks.countdown import Countdown
from minipav.tasks.text import GSM8K, Math
from minipav.utils import Fail

TASKS = {"calculator": Calculator, "countdown": Countdown, "gsm8k": GSM8K, "math": Math}


def make_task(name, dials):
    """The task of that name with these dials (a dict). Raises Fail for a name or a dial that is not there."""
    if name not in TASKS:
        raise Fail(f"--task {name}: unknown; choose one of {', '.join(TASKS)}")
    for dial in dials:
        if dial not in TASKS[name].__dataclass_fields__:
            raise Fail(f"--{dial} is no dial of task {name}: leave it out")
    return check(TASKS[name](**dials))
