"Regularizers and over-fitting diagnostics for image classifiers trained on little data."
import warnings
from importlib import import_module

__version__ = "0.1.0"

# fastai's and torchvision's imports call torch.jit.script, which PyTorch deprecates: nothing a user could mend
warnings.filterwarnings('ignore', message='.*torch.jit.script.*', category=FutureWarning)

# Where the public names live. They are imported when they are asked for, so `import phantom_nb` costs nothing.
_HOMES = {
    'attach':'plain', 'check_regularizer':'contract', 'Regularizer':'core', 'ActivationRegularizer':'core',
    'MHE':'regularizers.hyperspherical', 'CoMHE':'regularizers.hyperspherical',
    'hyperspherical_energy':'regularizers.hyperspherical',
    'PhantomEmbeddings':'regularizers.phantom', 'phantom_loss':'regularizers.phantom',
    'TargetedSparsity':'regularizers.sparsity', 'activation_sparsity':'measures.sparsity',
    'SAM':'regularizers.flatness', 'AMP':'regularizers.flatness', 'ISDA':'regularizers.semantic',
    'AL2':'regularizers.activations', 'Orthogonality':'regularizers.orthogonality', 'orthogonality':'regularizers.orthogonality',
    'GradientPenalty':'regularizers.smoothness', 'SpectralPenalty':'regularizers.smoothness',
    'spectral_norm':'regularizers.smoothness', 'NormalizeAndProject':'regularizers.norms',
    'SparsityMonitor':'measures.sparsity_monitor', 'IntraclassMonitor':'measures.intraclass',
    'intraclass_report':'measures.intraclass', 'interclass_similarity':'measures.embeddings',
    'diagnose':'experiments.diagnose', 'save_diagnosis':'experiments.diagnosis_page',
    'granulated_kendall':'measures.ranking', 'get_dls':'data', 'load_dataset':'data', 'create_model':'models',
    'FreezeNorm':'pretrained',
    'Run':'experiments.runner', 'run_one':'experiments.runner', 'run_many':'experiments.runner',
    'load_results':'experiments.runner', 'Checkpoint':'experiments.checkpoint'}

__all__ = [*_HOMES, '__version__']

def __getattr__(name):
    if name not in _HOMES: raise AttributeError(f"module 'phantom_nb' has no attribute {name!r}")
    value = getattr(import_module(f'phantom_nb.{_HOMES[name]}'), name)
    globals()[name] = value
    return value

def __dir__(): return sorted({*globals(), *__all__})
