"""Drop-in counterparts of torch.nn.functional."""

from fusedtricks.ops.batch_norm import batch_norm as batch_norm
from fusedtricks.ops.batch_norm import batch_norm_act as batch_norm_act
from fusedtricks.ops.cross_entropy import cross_entropy as cross_entropy
from fusedtricks.ops.cutmix import cutmix as cutmix
from fusedtricks.ops.distillation import distillation_loss as distillation_loss
from fusedtricks.ops.dropout import dropout as dropout
from fusedtricks.ops.dropout import dropout1d as dropout1d
from fusedtricks.ops.dropout import dropout2d as dropout2d
from fusedtricks.ops.dropout import dropout3d as dropout3d
from fusedtricks.ops.dropout_add_layer_norm import dropout_add_layer_norm as dropout_add_layer_norm
from fusedtricks.ops.layer_norm import layer_norm as layer_norm
from fusedtricks.ops.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from fusedtricks.ops.mixup import mixup as mixup
from fusedtricks.ops.rms_norm import rms_norm as rms_norm
from fusedtricks.ops.shake_shake import shake_shake as shake_shake
