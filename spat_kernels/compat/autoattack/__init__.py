"""AutoAttack's reference package (github.com/fra31/auto-attack): `from spat_kernels.compat.autoattack import AutoAttack`.

Its attacks, parameters and defaults on fused kernels, for PyTorch models (arXiv 2003.01690; in L1 arXiv 2103.01208). That package
need not be installed. Not as there: files of `state_path` are ours, what the log calls warnings are RuntimeWarnings, torch's
generators are left alone, and where a logit is NaN an image is misclassified.
"""

from .evaluation import AutoAttack as AutoAttack
