__version__ = "0.0.1"

import warnings

# fastai's and torchvision's imports call torch.jit.script, which PyTorch deprecates: nothing a user could mend
warnings.filterwarnings('ignore', message='.*torch.jit.script.*', category=FutureWarning)
