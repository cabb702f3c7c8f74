"Types for those who use the package: editors and type checkers know every public name, and find wrong calls"
import re, subprocess, sys
from pathlib import Path

import pytest
from test_project import ROOT

import phantom_nb

RIGHT = '''
from pathlib import Path
from torch import Tensor, nn
from phantom_nb import MHE, CoMHE, PhantomEmbeddings, Run, attach, create_model, get_dls, hyperspherical_energy
from phantom_nb.experiments.diagnose import Diagnosis, diagnose

model:nn.Module = create_model('small_cnn', size=8)
dls = get_dls(Path('photos'), size=64, augment='auto')
run = Run(n_train=200, method='mixup', settings={'alpha':.4})

def loss(x:Tensor, y:Tensor)->Tensor:
    with attach(model, MHE(.1), CoMHE('group', .5), PhantomEmbeddings(.3)) as penalty: return penalty(y) + hyperspherical_energy(x)

found:Diagnosis = diagnose(model, dls.train, dls.valid)
'''
WRONG = {"MHE(lam='much')":'arg-type', "get_dls(n_train='all')":'arg-type', "create_model(3)":'arg-type',
    "hyperspherical_energy(3)":'arg-type', "phantom_nb.MHEE":'attr-defined', "Run(seed='one')":'arg-type'}

def stub():
    "What a type checker is told of the lazy names of the package."
    homes = {name:getattr(phantom_nb, name).__module__.removeprefix('phantom_nb.') for name in phantom_nb._HOMES}
    lines = [f'from .{home} import {name} as {name}' for name,home in homes.items()]
    return '\n'.join(['# Made by tests/test_types.py; names are imported when they are asked for, which type checkers cannot see.', '__version__: str', *lines, ''])

def test_the_stub_names_everything_public():
    path = ROOT/'phantom_nb/__init__.pyi'
    assert path.read_text(encoding='utf-8')==stub(), 'run python tests/test_types.py'
    assert (ROOT/'phantom_nb/py.typed').exists()

PLANTED = 'phantom_nb/experiments/rivals.py'

@pytest.fixture(scope='module')
def errors(pytestconfig, tmp_path_factory):
    "What mypy says in one run over the package, with an error planted in it, and users' programs: file, line and kind of each error."
    pytest.importorskip('mypy')
    folder = tmp_path_factory.mktemp('types')
    right,wrong,planted = (folder/f'{name}.py' for name in ('right','wrong','planted'))
    right.write_text(RIGHT)
    wrong.write_text('import phantom_nb\nfrom phantom_nb import MHE, Run, create_model, get_dls, hyperspherical_energy\n'+'\n'.join(WRONG)+'\n')
    planted.write_text((ROOT/PLANTED).read_text(encoding='utf-8')+'\ndef _untyped(x): return len(3)\n', encoding='utf-8')
    cmd = [sys.executable, '-m', 'mypy', '--cache-dir', str(pytestconfig.cache.mkdir('mypy')), '--shadow-file', PLANTED, str(planted)]
    done = subprocess.run([*cmd, 'phantom_nb', str(right), str(wrong)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode==1, done.stdout+done.stderr
    return [(Path(file).name, int(line), kind) for file,line,kind in re.findall(r'^(.+?):(\d+): error: .*\[([\w-]+)\]$', done.stdout, re.M)]

def test_the_package_and_right_calls_pass_a_type_checker(errors):
    assert not [e for e in errors if e[0] not in ('wrong.py', Path(PLANTED).name)]

def test_wrong_calls_are_found(errors):
    assert [e[1:] for e in errors if e[0]=='wrong.py']==[(i, kind) for i,kind in enumerate(WRONG.values(), 3)]

def test_an_error_in_the_body_of_an_untyped_function_of_the_package_is_found(errors):
    last = len((ROOT/PLANTED).read_text(encoding='utf-8').splitlines())+2
    assert [e[1:] for e in errors if e[0]==Path(PLANTED).name]==[(last, 'arg-type')]

def test_few_errors_are_passed_over():
    ignored = [line for path in (ROOT/'phantom_nb').rglob('*.py') for line in path.read_text(encoding='utf-8').splitlines() if 'type: ignore' in line]
    assert len(ignored)<=4 and all('type: ignore[' in line for line in ignored), ignored

if __name__=='__main__': (ROOT/'phantom_nb/__init__.pyi').write_text(stub(), encoding='utf-8')
