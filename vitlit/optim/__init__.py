"""Parameter groups, learning-rate schedules, and optimizers that torch lacks."""

from vitlit.optim.groups import Groups, OptimizerFactory, build_optimizer, table
from vitlit.optim.lamb import LAMB
from vitlit.optim.muon import Muon
from vitlit.optim.schedule import Schedule, follow_schedule

__all__ = ["LAMB", "Groups", "Muon", "OptimizerFactory", "Schedule", "build_optimizer", "follow_schedule", "table"]
