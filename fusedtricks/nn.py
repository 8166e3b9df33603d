"""Drop-in counterparts of torch.nn."""

from fusedtricks.ops.batch_norm import BatchNorm1d as BatchNorm1d
from fusedtricks.ops.batch_norm import BatchNorm2d as BatchNorm2d
from fusedtricks.ops.batch_norm import BatchNorm3d as BatchNorm3d
from fusedtricks.ops.batch_norm import BatchNormAct1d as BatchNormAct1d
from fusedtricks.ops.batch_norm import BatchNormAct2d as BatchNormAct2d
from fusedtricks.ops.batch_norm import BatchNormAct3d as BatchNormAct3d
from fusedtricks.ops.cross_entropy import CrossEntropyLoss as CrossEntropyLoss
from fusedtricks.ops.cutmix import CutMix as CutMix
from fusedtricks.ops.distillation import DistillationLoss as DistillationLoss
from fusedtricks.ops.dropout import Dropout as Dropout
from fusedtricks.ops.dropout import Dropout1d as Dropout1d
from fusedtricks.ops.dropout import Dropout2d as Dropout2d
from fusedtricks.ops.dropout import Dropout3d as Dropout3d
from fusedtricks.ops.dropout_add_layer_norm import DropoutAddLayerNorm as DropoutAddLayerNorm
from fusedtricks.ops.layer_norm import LayerNorm as LayerNorm
from fusedtricks.ops.mixup import Mixup as Mixup
from fusedtricks.ops.rms_norm import RMSNorm as RMSNorm
from fusedtricks.ops.shake_shake import ShakeShake as ShakeShake
from fusedtricks.ops.sync_batch_norm import SyncBatchNorm as SyncBatchNorm
