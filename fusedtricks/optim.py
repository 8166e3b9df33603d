"""Drop-in counterparts of torch.optim."""

from fusedtricks.ops.adagrad import Adagrad as Adagrad
from fusedtricks.ops.adamw import Adam as Adam
from fusedtricks.ops.adamw import AdamW as AdamW
from fusedtricks.ops.nadam import NAdam as NAdam
from fusedtricks.ops.rmsprop import RMSprop as RMSprop
from fusedtricks.ops.sgd import SGD as SGD
