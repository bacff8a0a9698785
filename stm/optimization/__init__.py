"""Merge plans better than the paper's: a search without labels and without training (docs/plans.md).

`optimize_plan(model, "0.6x")` returns the plan that changes the model's predictions least within a budget.
"""

from .budget import Budget as Budget
from .budget import LatencyTable as LatencyTable
from .budget import parse_budget as parse_budget
from .optimizer import Optimized as Optimized
from .optimizer import optimize_plan as optimize_plan
from .schedules import OptimizedSchedule as OptimizedSchedule
from .schedules import optimize_schedule as optimize_schedule
