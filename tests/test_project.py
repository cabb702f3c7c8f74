"The project's own rules: generated files are up to date, notebooks read well, nothing lies around."
import ast, io, os, re, shutil, subprocess, sys, tokenize
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path

import nbformat, pytest
from readme import readme
from toplevel import toplevel

ROOT = Path(__file__).resolve().parents[1]
TOP = {'nbs', 'phantom_nb', 'results', 'tests', '.ci', '.gitignore', 'LICENSE', 'Makefile', 'README.md',
    'CONTRIBUTING.md', 'CHANGELOG.md', 'CITATION.cff', 'constraints.txt', 'pyproject.toml', 'settings.ini', 'setup.py'}
NBS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not any(o[0] in '._' for o in p.relative_to(ROOT).parts))
FUNCTIONS = ast.FunctionDef,ast.AsyncFunctionDef
DEFS = *FUNCTIONS,ast.ClassDef
each_nb = pytest.mark.parametrize('path', NBS, ids=[str(p.relative_to(ROOT/'nbs')) for p in NBS])


# The copy: what git tracks, and what it does not ignore

def project_files():
    "List the project's files, relative to its root."
    out = subprocess.run(['git', 'ls-files', '-coz', '--exclude-standard'], cwd=ROOT, capture_output=True, text=True)
    if out.returncode: pytest.skip('the project is not a git checkout, so its files cannot be told from leftovers')
    return sorted({f for f in out.stdout.split('\0') if f and (ROOT/f).is_file()})

def copy_tree(to):
    "Copy the project's files to folder `to`; return it."
    for f in project_files():
        (to/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/f, to/f)
    return to

def tool(cwd, *args):
    "Run a command of this Python environment in `cwd`; fail with what it printed."
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    env = dict(os.environ, PYTHONPATH=str(cwd), MPLBACKEND='agg', PATH=path)
    out = subprocess.run(args, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert out.returncode==0, f"{' '.join(args)} ended with {out.returncode}:\n{out.stdout[-4000:]}"
    return out.stdout

def contents(root): return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob('*') if p.is_file()}


def test_top_level_holds_only_what_is_agreed():
    extra = {f.split('/')[0] for f in project_files()} - TOP
    assert not extra, f'not part of the layout: {sorted(extra)}'

def test_export_and_clean_leave_no_diff(tmp_path):
    before = contents(copy_tree(tmp_path))
    tool(tmp_path, 'nbdev-export')
    tool(tmp_path, 'nbdev-clean')
    tool(tmp_path, sys.executable, '-c', 'from nbdev.quarto import refresh_quarto_yml as f; f()')
    after = {k:v for k,v in contents(tmp_path).items() if '__pycache__' not in k}
    changed = sorted(k for k in before.keys()|after.keys() if before.get(k)!=after.get(k))
    assert not changed, f'run nbdev-export and nbdev-clean, then commit: {changed}'

def test_every_module_comes_from_a_notebook():
    "Nobody edits or leaves behind a generated file: each module has the notebook with its path."
    for p in (ROOT/'phantom_nb').rglob('*.py'):
        if p.name in ('__init__.py','_modidx.py'): continue
        assert (ROOT/'nbs'/p.relative_to(ROOT/'phantom_nb').with_suffix('.ipynb')).exists(), f'{p.name} has no notebook'

def test_readme_is_made_from_the_index():
    assert (ROOT/'README.md').read_text(encoding='utf-8')==readme(), 'nbs/index.ipynb changed: run make readme'

def test_files_for_hosts_are_made_from_pages_and_settings():
    for name,text in toplevel().items():
        assert (ROOT/name).read_text(encoding='utf-8')==text, f'{name} is old: run make readme'

@pytest.mark.parametrize('name', ['README.md','CONTRIBUTING.md','CHANGELOG.md'])
def test_links_at_the_top_lead_somewhere(name):
    prose = re.sub(r'```.*?```', '', (ROOT/name).read_text(encoding='utf-8'), flags=re.S)
    for to in re.findall(r'\]\(([^)\s#]+)[^)]*\)', prose):
        if not re.match('[a-z]+:', to): assert (ROOT/to).exists(), f'{name} links to {to}, which is not there'

def test_every_notebook_is_in_the_sidebar():
    listed = set(re.findall(r'\S+\.ipynb', (ROOT/'nbs/sidebar.yml').read_text()))
    assert listed=={str(p.relative_to(ROOT/'nbs')) for p in NBS}

def test_constraints_pin_every_requirement():
    lines = [l for l in (ROOT/'constraints.txt').read_text().splitlines() if l and l[0]!='#']
    assert all(re.fullmatch(r'[\w.-]+==[\w.!-]+', l) for l in lines), 'only name==version: no paths, no addresses'
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini')
    kinds = [k for k in ini['DEFAULT'] if k.endswith('requirements')]
    needed = ' '.join(ini['DEFAULT'][k] for k in kinds)
    names = {re.match(r'[\w-]+', o)[0].replace('_', '-') for o in needed.split()}
    assert not (missing := names - {l.split('==')[0] for l in lines}), f'not pinned: {missing}'

def test_nothing_names_a_machine():
    "No home folders, temporary paths or private registries in what is published."
    bad = re.compile(r'/(root|home|Users)/\w|/tmp/\w|index-url|\bfile://|site-packages/')
    for f in project_files():
        if f.endswith(('.npz','.png')) or f==f'tests/{Path(__file__).name}': continue
        text = (ROOT/f).read_text(encoding='utf-8', errors='ignore')
        assert not (m := bad.search(text)), f'{f}: {text[max(0, m.start()-40):m.end()+40]!r}'


# Notebooks

class Cell:
    "A code cell: its source without directives, its directives, its syntax tree and its outputs."
    def __init__(self, cell):
        lines = cell.source.splitlines()
        self.directives = {re.match(r'#\|\s*([\w-]+)', l)[1] for l in lines if l.startswith('#|')}
        self.lines = [l for l in lines if not l.startswith('#|')]
        self.default_exp = next((l.split()[-1] for l in lines if 'default_exp' in l), None)
        self.source,self.outputs,self.id = '\n'.join(self.lines),cell.outputs,cell.id
        plain = '\n'.join('' if l.lstrip()[:1] in ('%','!') else l for l in self.lines)
        self.tree = ast.Module([], []) if self.source.startswith('%%') else ast.parse(plain)
        self.exported = bool(self.directives & {'export','exports','exporti'})
        self.runs = not (re.search(r'#\|\s*eval:\s*false', cell.source) or self.directives & {'slow','gpu'})

def read(path): return nbformat.read(path, as_version=4)
def code_cells(path): return [Cell(c) for c in read(path).cells if c.cell_type=='code' and c.source.strip()]

def functions(node, prefix=''):
    "Yield (dotted name, node) of functions and methods, not of functions inside functions."
    for o in node.body:
        if isinstance(o, FUNCTIONS): yield prefix+o.name, o
        if isinstance(o, ast.ClassDef): yield from functions(o, f'{prefix}{o.name}.')

def is_public(name): return all(o=='__init__' or not o.startswith('_') for o in name.split('.'))

def comment_lines(source):
    "Numbers of the lines that end in a comment."
    return {t.start[0] for t in tokenize.generate_tokens(io.StringIO(source+'\n').readline) if t.type==tokenize.COMMENT}

def inherited(module, name, f):
    "Whether `f` overrides a method of a base class, which documents it."
    patched = f.args.args and ast.unparse(f.args.args[0].annotation or ast.Constant(None))
    cls,_,meth = name.rpartition('.')
    bases = getattr(getattr(module, cls or str(patched), None), '__mro__', ())[1:]
    return meth!='__init__' and any(hasattr(o, meth) for o in bases)

def undocumented(cell, module):
    "Yield the parameters and returns of public functions that have no comment of their own."
    documented = comment_lines(cell.source)
    for name,f in functions(cell.tree):
        a,decorators = f.args,' '.join(map(ast.unparse, f.decorator_list))
        if not is_public(name) or inherited(module, name, f) or '.command(' in decorators: continue  # typer: see help=
        args = a.posonlyargs+a.args+a.kwonlyargs+[o for o in (a.vararg, a.kwarg) if o]
        if 'delegates' in decorators: args = [o for o in args if o is not a.kwarg]
        if args and ('patch' in decorators or args[0].arg in ('self','cls')): args = args[1:]
        ends = [o.end_lineno for o in args]
        for o in args:
            if o.end_lineno not in documented or ends.count(o.end_lineno)>1: yield f'{name}({o.arg})'
        none = f.returns and ast.unparse(f.returns)=='None'
        gives = not none and any(isinstance(o, ast.Return) and o.value for o in own_nodes(f))
        line = f.returns.end_lineno if f.returns else None
        if gives and (line not in documented or line in ends): yield f'{name} -> ?'

def own_nodes(f):
    "Yield the nodes of a function's body, without those of functions inside it."
    todo = list(f.body)
    while todo:
        o = todo.pop()
        yield o
        if not isinstance(o, (*DEFS, ast.Lambda)): todo += ast.iter_child_nodes(o)

def draws(cell):
    "Whether a cell starts a figure when it runs, as opposed to defining something that will."
    quiet = {'close','rcParams','style','rc','ioff','ion','switch_backend'}
    top = [o for o in cell.tree.body if not isinstance(o, DEFS)]
    attrs = [a for o in top for a in ast.walk(o) if isinstance(a, ast.Attribute)]
    used = {a.attr for a in attrs if isinstance(a.value, ast.Name) and a.value.id=='plt'}
    return bool(used-quiet) and 'close' not in used

def has_image(cell): return any(k.startswith('image/') for o in cell.outputs for k in o.get('data', {}))


def module_of(path):
    "Name of the module that a notebook exports to, None for none."
    for c in code_cells(path):
        if 'default_exp' in c.directives: return f"phantom_nb.{c.default_exp}".removesuffix('.__init__')

@each_nb
def test_a_modules_path_is_its_notebooks(path):
    "But for a folder's own page, which makes the package."
    module = module_of(path)
    parts = path.relative_to(ROOT/'nbs').with_suffix('').parts
    if module: assert module=='.'.join(('phantom_nb', *(parts if parts[-1]!='index' else parts[:-1])))

@each_nb
def test_notebook_is_not_too_big(path):
    nb = read(path)
    words = sum(len(c.source.split()) for c in nb.cells if c.cell_type=='markdown')
    pictures = sum(k.startswith('image/') for c in code_cells(path) for o in c.outputs for k in o.get('data', {}))
    sizes = dict(cells=len(nb.cells), words=words, kB=path.stat().st_size/1000, figures=pictures)
    limits = dict(cells=80, words=2500, kB=500, figures=6)
    assert not {k:v for k,v in sizes.items() if v>limits[k]}, sizes

@each_nb
def test_lines_and_functions_are_short(path):
    for c in code_cells(path):
        assert not [l for l in c.lines if len(l)>120], c.id
        if not c.exported: continue
        for name,f in functions(c.tree):
            body = [l for l in c.lines[f.body[0].lineno-1:f.end_lineno] if l.strip()]
            assert len(body)<=40, f'{name}: {len(body)} lines below its signature'

@each_nb
def test_exported_code_is_documented(path):
    cells = [c for c in code_cells(path) if c.exported]
    if not cells: return
    module = import_module(module_of(path))
    missing = [o for c in cells for o in undocumented(c, module)]
    assert not missing, f'no docment: {missing}'
    public = [(n,f) for c in cells for n,f in functions(c.tree) if is_public(n) and '.' not in n]
    silent = [n for n,f in public if not ast.get_docstring(f) and not inherited(module, n, f)]
    assert not silent, f'no docstring: {silent}'

@each_nb
def test_public_parameters_have_types(path):
    bare = []
    for c in code_cells(path):
        if not c.exported: continue
        for name,f in functions(c.tree):
            if not is_public(name) or '.command(' in ' '.join(map(ast.unparse, f.decorator_list)): continue
            args = f.args.posonlyargs+f.args.args+f.args.kwonlyargs
            bare += [f'{name}({o.arg})' for o in args if not o.annotation and o.arg not in ('self','cls')]
    assert not bare, f'no type: {bare}'

@each_nb
def test_classes_are_written_whole(path):
    "`@patch` extends what is not ours; a class of the same page has its methods inside."
    cells = [c for c in code_cells(path) if c.exported]
    own = {o.name for c in cells for o in ast.walk(c.tree) if isinstance(o, ast.ClassDef)}
    for c in cells:
        for o in ast.walk(c.tree):
            if isinstance(o, FUNCTIONS) and o.args.args and o.args.args[0].annotation:
                kind = ast.unparse(o.args.args[0].annotation)
                patched = 'patch' in ' '.join(map(ast.unparse, o.decorator_list))
                assert not (patched and kind in own), f'{kind}.{o.name} is patched: write it inside the class'

@each_nb
def test_code_is_not_golfed(path):
    "No more than a few lines of a page assign three names or more at once."
    lines = [l for c in code_cells(path) if c.exported for l in c.lines if re.match(r'\s*[\w.]+(?:,\s*[\w.]+){2,}\s*=[^=]', l)]
    assert len(lines)<=4, lines

@each_nb
def test_first_cell_is_a_title_and_one_line(path):
    "The site shows no more of it."
    lines = [l for l in read(path).cells[0].source.split('\n') if l.strip()]
    assert len(lines)==2 and lines[0].startswith('# ') and lines[1].startswith('> '), lines

def test_code_is_shown_where_it_is_explained():
    "Cells that define something are `#| exports`, so the site shows them; `#| export` is for imports and housekeeping."
    shown,all_lines,hidden = 0,0,{}
    for path in NBS:
        for c in code_cells(path):
            if not c.exported or not any(isinstance(o, DEFS) for o in c.tree.body): continue
            all_lines += len(c.lines)
            if 'exports' in c.directives: shown += len(c.lines)
            else: hidden[path.stem] = hidden.get(path.stem, 0)+len(c.lines)
    assert shown>=.9*all_lines, f'{shown} of {all_lines} lines are shown; hidden: {hidden}'

@each_nb
def test_exported_code_imports_by_name_and_leaves_nothing_undone(path):
    for c in code_cells(path):
        if c.exported: assert not re.search(r'^\s*from \S+ import \*', c.source, re.M), f'{c.id}: import names, not *'
        assert not re.search(r'\b(TODO|FIXME|XXX)\b', c.source), c.id

@each_nb
def test_outputs_are_saved(path):
    for c in code_cells(path):
        assert not [o for o in c.outputs if o.output_type=='error'], f'{c.id}: an error is saved'
        if c.runs and draws(c): assert has_image(c), f'{c.id}: its picture is not saved, run nbdev-test --save'
