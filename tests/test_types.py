"Types for those who use the package: editors and type checkers know every public name, and find wrong calls"
import os, subprocess, sys

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
run = Run(n_train=200, method='mixup')

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

def checked(code, tmp_path):
    "What mypy says of a program that uses the package."
    pytest.importorskip('mypy')
    (tmp_path/'program.py').write_text(code)
    (tmp_path/'mypy.ini').write_text('[mypy]\nfollow_imports = silent\nignore_missing_imports = True\n')
    cmd = [sys.executable, '-m', 'mypy', '--config-file', 'mypy.ini', '--cache-dir', str(tmp_path.parent/'mypy'), 'program.py']
    done = subprocess.run(cmd, cwd=tmp_path, env=dict(os.environ, MYPYPATH=str(ROOT)), capture_output=True, text=True)
    return done.stdout+done.stderr

def test_right_calls_pass_a_type_checker(tmp_path):
    out = checked(RIGHT, tmp_path)
    assert 'Success' in out, out

def test_wrong_calls_are_found(tmp_path):
    head = 'import phantom_nb\nfrom phantom_nb import MHE, Run, create_model, get_dls, hyperspherical_energy\n'
    out = checked(head+'\n'.join(WRONG)+'\n', tmp_path)
    for i,(call,kind) in enumerate(WRONG.items(), 3): assert any(f'program.py:{i}:' in line and f'[{kind}]' in line for line in out.splitlines()), (call, out)

if __name__=='__main__': (ROOT/'phantom_nb/__init__.pyi').write_text(stub(), encoding='utf-8')
