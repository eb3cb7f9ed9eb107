"""Who runs in the next step. Integers and clocks only; nothing here sees a tensor."""

from penstock.engine.scheduler.admission import AdmissionPolicy, ExpectedGrowth, WorstCase
from penstock.engine.scheduler.batch import ScheduledBatch
from penstock.engine.scheduler.fairness import TokenFairness
from penstock.engine.scheduler.ordering import EarliestDeadlineFirst, OrderingPolicy
from penstock.engine.scheduler.preemption import CheapestToRecompute, VictimPolicy
from penstock.engine.scheduler.scheduler import Scheduler

__all__ = [
    "AdmissionPolicy",
    "CheapestToRecompute",
    "EarliestDeadlineFirst",
    "ExpectedGrowth",
    "OrderingPolicy",
    "ScheduledBatch",
    "Scheduler",
    "TokenFairness",
    "VictimPolicy",
    "WorstCase",
]
