"""`verify_schedule`: a proof, without a GPU, that a schedule is safe to run.

In: a graph, a schedule by whomever, a profile. Out: nothing, or a `ScheduleError` with the rule that is broken. It reads `graph` and `schedule`
only, and never imports the search that it must not trust.
"""

from mkdsl.proof._errors import Rule, ScheduleError
from mkdsl.proof._order import Execution
from mkdsl.proof._races import Accesses, Violation, exchanges, overtakings
from mkdsl.proof._verify import verify_schedule

__all__ = ["Accesses", "Execution", "Rule", "ScheduleError", "Violation", "exchanges", "overtakings", "verify_schedule"]
