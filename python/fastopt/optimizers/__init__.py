"""
The optimizers: a family a module, each class beside its reference function.

In their formulas, g is the gradient of a parameter p (negated with ``maximize``), t the number of
the step from 1 on, and all operations are elementwise. Where a formula does not have it, weight
decay is L2 regularization: g = g + weight_decay p comes first.

A reference function makes one step in NumPy: it takes the parameter ``p``, its gradient ``g``, the
states under their names in torch, and keyword-only the number ``t`` of the step (from 1 on) and the
hyper-parameters; it returns the new parameter and states. States start at zero unless the
docstring says otherwise. Arrays are of float32 or float64, all of one shape and dtype; Python
numbers are rounded to that dtype when they meet an array.
"""

from typing import TYPE_CHECKING

from fastopt.optimizers.adabelief import *
from fastopt.optimizers.adadelta import *
from fastopt.optimizers.adafactor import *
from fastopt.optimizers.adagrad import *
from fastopt.optimizers.adam import *
from fastopt.optimizers.adamax import *
from fastopt.optimizers.adan import *
from fastopt.optimizers.ademamix import *
from fastopt.optimizers.adopt import *
from fastopt.optimizers.asgd import *
from fastopt.optimizers.base import Optimizer as Optimizer
from fastopt.optimizers.lamb import *
from fastopt.optimizers.lion import *
from fastopt.optimizers.muon import *
from fastopt.optimizers.nadam import *
from fastopt.optimizers.prodigy import *
from fastopt.optimizers.radam import *
from fastopt.optimizers.rmsprop import *
from fastopt.optimizers.rprop import *
from fastopt.optimizers.schedule_free import *
from fastopt.optimizers.sgd import *
from fastopt.optimizers.stable_adamw import *

if not TYPE_CHECKING:  # a type checker sees the imports, but would not follow the registry
    __all__ = ["Optimizer", *Optimizer.registry]
