"""Break the package's functions on purpose, one change at a time, and see whether the tests notice.

    python tests/mutation.py regularizers.energy --per 10        # record the score of a module
    python tests/mutation.py regularizers.energy --kinds         # go on until each function was broken in every way
    python tests/mutation.py --survivors                         # try again what nobody noticed

No file of the package is written. pytest collects the module's tests once; for every change a fork swaps the code of
one function, runs the tests that call it until one fails, and ends. Tools such as mutmut change the files and start
Python anew for every change.
"""
import ast, copy, importlib, inspect, json, os, random, select, signal, sys, time
from collections import defaultdict
from functools import partial
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT/'results'/'mutation.jsonl'
BUDGET = 10. # seconds of tests that a change has to pass at first; what survives is tried again with all of
# them
KEY = 'function','kind','before','after'
TESTS = { # test files of a module
    'regularizers.energy':'hyperspherical', 'regularizers.projections':'projections',
    'regularizers.comhe':'projections',
    'regularizers.phantoms':'phantom numbers', 'regularizers.phantom':'phantom', 'regularizers.sparsity':'sparsity',
    'regularizers.flatness':'flatness numbers', 'regularizers.semantic':'semantic numbers',
    'regularizers.norms':'norms numbers',
    'regularizers.activations':'activations numbers', 'regularizers.orthogonality':'orthogonality numbers',
    'regularizers.smoothness':'smoothness numbers', 'measures.clustering':'clustering numbers',
    'measures.embeddings':'embeddings numbers', 'measures.sparsity':'sparsity numbers',
    'measures.sharpness':'sharpness numbers',
    'measures.ranking':'ranking', 'measures.capture':'capture', 'measures.intraclass':'intraclass',
    'measures.sparsity_monitor':'sparsity', 'experiments.stats':'stats', 'core':'core training plain',
    'hooks':'hooks capture', 'kinds':'flatness semantic norms', 'contract':'core', 'floats':'numbers', 'plain':'plain',
    'data.augment':'data folders', 'data.subsets':'data folders', 'experiments.effects':'atlas',
    'experiments.optimizer':'optimizer', 'experiments.quantities':'quantities', 'experiments.suggest':'suggest'}
# what these draw is judged by eye
PICTURES = ('plot', 'heat_map', 'loss_curves', 'redraw', '_report_figure', '_axis_label')

# What is changed, and what it is called
SWAPS = {ast.Add:('sign', ast.Sub), ast.Sub:('sign', ast.Add),
    ast.Mult:('operator', ast.Div), ast.Div:('operator', ast.Mult),
    ast.FloorDiv:('operator', ast.Mult), ast.BitAnd:('condition', ast.BitOr), ast.BitOr:('condition', ast.BitAnd),
    ast.And:('condition', ast.Or), ast.Or:('condition', ast.And),
    ast.Eq:('condition', ast.NotEq), ast.NotEq:('condition', ast.Eq),
    ast.Lt:('off by one', ast.LtE), ast.LtE:('off by one', ast.Lt),
    ast.Gt:('off by one', ast.GtE), ast.GtE:('off by one', ast.Gt),
    ast.Is:('condition', ast.IsNot), ast.IsNot:('condition', ast.Is),
    ast.In:('condition', ast.NotIn), ast.NotIn:('condition', ast.In)}
NAMES = dict(mean='sum', sum='mean', amax='amin', amin='amax', max='min', min='max', argmax='argmin',
    clamp_min='clamp_max',
    clamp_max='clamp_min', any='all', all='any', no_grad='enable_grad')
KINDS = dict(mean='mean for sum', sum='mean for sum', no_grad='missing detach')
TYPES = dict(float64='float32', float32='float64', float='half', double='float', long='int')
LEFT_OUT = dict.fromkeys('masked_fill masked_fill_ fill_diagonal_ zero_'.split(), 'self-pair kept')
LEFT_OUT['detach'] = 'missing detach'
LEFT_OUT |= dict.fromkeys('clamp clamp_min relu abs square sqrt rsqrt nan_to_num sort clone where'.split(), 'step left out')
AXES = set('sum mean amax amin max min softmax logsumexp topk sort cumsum flatten unflatten movedim transpose '
    'unsqueeze squeeze cat stack all any std var norm diagonal split gather argmax index_select index_add_ nanmean argsort '
    'vector_norm repeat_interleave'.split())

def changes_of(node, in_axis):
    "Yield (kind, new node) for every way to break a node of the syntax tree"
    def but(**kwargs): return ast.copy_location(type(node)(**dict(ast.iter_fields(node)) | kwargs), node)
    if isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)) and type(node.op) in SWAPS:
        kind,op = SWAPS[type(node.op)]
        yield kind, but(op=op())
    if isinstance(node, ast.Compare) and len(node.ops)==1 and type(node.ops[0]) in SWAPS:
        kind,op = SWAPS[type(node.ops[0])]
        yield kind, but(ops=[op()])
    if isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
        yield ('sign' if isinstance(node.op, ast.USub) else 'condition'), node.operand
    if isinstance(node, ast.Attribute) and node.attr in TYPES: yield 'wrong type', but(attr=TYPES[node.attr])
    if isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield KINDS.get(node.attr, 'condition'), but(attr=NAMES[node.attr])
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LEFT_OUT:
        yield LEFT_OUT[node.func.attr], node.func.value
    if isinstance(node, ast.Constant) and type(node.value) is bool: yield 'condition', but(value=not node.value)
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        value = node.value
        if in_axis: yield 'wrong axis', but(value=value-1 if value>0 else value+1)
        else: yield 'off by one', but(value=value+1)
    elif isinstance(node, ast.Constant) and type(node.value) is float:
        yield 'constant', but(value=2*node.value if node.value else 1.)
    if isinstance(node, (ast.If, ast.IfExp)): yield 'condition', but(test=ast.UnaryOp(ast.Not(), node.test))
    if isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        call = ast.Call(ast.Name('_without_gradient', ast.Load()), [node.value], [])
        yield 'extra detach', but(value=call)
    if isinstance(node, ast.AugAssign) or isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield 'step left out', ast.copy_location(ast.Pass(), node)

GRADIENTS = [] # filled when an extra detach took a gradient away

def without_gradient(value):
    "What an extra detach makes of a result"
    if getattr(value, 'requires_grad', False): GRADIENTS.append(True)
    if type(value) in (tuple, list): return type(value)(map(without_gradient, value))
    return value.detach() if hasattr(value, 'detach') else value

def sites(function):
    "Yield (parent, field, index, node, whether it names an axis) below a function, messages and defaults aside"
    def walk(parent, in_axis=False):
        for field,value in ast.iter_fields(parent):
            own = field in ('decorator_list', 'annotation', 'returns', 'args')
            if own and isinstance(parent, ast.FunctionDef): continue
            for i,node in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if not isinstance(node, ast.AST) or isinstance(node, (ast.Raise, ast.JoinedStr, ast.Assert)): continue
                name = getattr(parent.func, 'attr', '') if isinstance(parent, ast.Call) else ''
                axis = name in AXES and field=='args'
                axis = axis or isinstance(parent, ast.keyword) and parent.arg in ('dim', 'axis')
                axis = axis or in_axis and isinstance(parent, (ast.Tuple, ast.UnaryOp))
                if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                    yield parent, field, i, node, axis
                    yield from walk(node, axis)
    yield from walk(function)

def put(parent, field, i, node):
    if i is None: setattr(parent, field, node)
    else: getattr(parent, field)[i] = node

def functions_of(tree):
    "Yield (qualified name, node) of functions and methods"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef): yield node.name, node
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.FunctionDef): yield f'{node.name}.{part.name}', part

def short(node, longest=100):
    text = ' '.join(ast.unparse(ast.fix_missing_locations(copy.deepcopy(node))).split())
    return text if len(text)<=longest else text[:longest]+'…'

def mutants_of(name, node):
    "All (function, kind, what was, what is, code) of one function"
    for parent,field,i,old,in_axis in list(sites(node)):
        for kind,new in changes_of(old, in_axis):
            before,after = short(old), short(new)
            if isinstance(old, (ast.If, ast.IfExp)): before,after = short(old.test), short(new.test)
            if isinstance(old, ast.Constant): before = f'{before} in {short(parent, 60)}'
            put(parent, field, i, new)
            mutated = ast.fix_missing_locations(copy.deepcopy(node))
            put(parent, field, i, old)
            yield dict(function=name, kind=kind, line=getattr(old, 'lineno', 0), before=before, after=after), mutated

def sample(mutants, n, chance):
    "n of a function's mutants, of as many kinds as there are"
    kinds = defaultdict(list)
    for mutant in mutants: kinds[mutant[0]['kind']].append(mutant)
    for group in kinds.values(): chance.shuffle(group)
    groups = sorted(kinds.values(), key=lambda group: chance.random())
    return [mutant for row in zip_longest(*groups) for mutant in row if mutant is not None][:n]

def code_of(tree, name):
    "Code of a function in a compiled module"
    code = compile(tree, '<mutant>', 'exec')
    for part in name.split('.'): code = next(c for c in code.co_consts if inspect.iscode(c) and c.co_name==part)
    return code

def target_of(module, name):
    "The function itself, behind its decorators"
    found = module
    for part in name.split('.'): found = inspect.getattr_static(found, part)
    while not inspect.isfunction(found):
        found = getattr(found, '__wrapped__', None) or getattr(found, '__func__', None) or getattr(found, 'fget', None)
    return inspect.unwrap(found)

def in_a_fork(work, limit):
    "What `work()` gives in a process of its own; None if it takes longer than `limit` seconds or dies"
    read,write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(read)
            os.setpgid(0, 0)
            null = os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2): os.dup2(null, stream)
            with os.fdopen(write, 'w') as pipe: json.dump(work(), pipe)
        finally: os._exit(0)
    os.close(write)
    text,end = b'',time.perf_counter()+limit
    while (left := end-time.perf_counter())>0 and select.select([read], [], [], left)[0]:
        part = os.read(read, 2**16)
        if not part: break
        text += part
    os.close(read)
    try: os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError: pass
    os.waitpid(pid, 0)
    return json.loads(text) if text else None

def failed(item, following):
    "Whether a test fails"
    from _pytest.runner import runtestprotocol
    return any(report.failed for report in runtestprotocol(item, nextitem=following, log=False))

def measured(items, file):
    "How long each test takes, whether it fails, and which functions of a file it calls"
    found = {}
    for item,following in zip_longest(items, items[1:]):
        called,start = set(),time.perf_counter()
        def watch(frame, event, arg):
            code = frame.f_code
            if event=='call' and code.co_filename==file: called.add(code.co_qualname.replace('.<locals>', ''))
        sys.setprofile(watch)
        fails = failed(item, following)
        sys.setprofile(None)
        found[item.nodeid] = time.perf_counter()-start,fails,sorted(called)
    return found

class Mutation:
    "In place of pytest's loop: break functions one by one, and run the tests that call them until one fails"
    def __init__(self, name, per, seed, only=None, beyond=False):
        self.name,self.per,self.seed,self.only,self.beyond = name,per,seed,only,beyond
        self.noticed,self.void = [],[]

    def pytest_collection_modifyitems(self, items):
        "Three cases at most of each parametrized test, twenty for survivors"
        most = 3 if self.only is None else 20
        cases,chance = defaultdict(list),random.Random(self.seed)
        for item in items: cases[item.fspath, item.originalname].append(item)
        items[:] = [item for group in cases.values() for item in chance.sample(group, min(most, len(group)))]

    def pytest_runtestloop(self, session):
        module = importlib.import_module(f'phantom_nb.{self.name}')
        module._without_gradient = without_gradient
        tree,start = ast.parse(inspect.getsource(module)),time.perf_counter()
        tests = in_a_fork(lambda: measured(session.items, module.__file__), 1800)
        broken = [name for name,(_,fails,_) in tests.items() if fails]
        if broken: raise SystemExit(f"{self.name}: tests fail as they are: {', '.join(broken[:5])}")
        row = dict(module=self.name, functions=0, possible=0, tried=0, killed=0, per=self.per, seed=self.seed)
        row['survivors'] = []
        for function,node in functions_of(tree):
            if any(part in function for part in PICTURES): continue
            mutants = list(mutants_of(function, node))
            if not mutants: continue
            row['functions'] += 1
            row['possible'] += len(mutants)
            chance = random.Random(f'{self.seed} {self.name} {function}')
            if self.beyond: mutants = sample(mutants, len({said['kind'] for said,_ in mutants}), chance)[self.per:]
            elif self.only is None: mutants = sample(mutants, self.per, chance)
            else: mutants = [(said, new) for said,new in mutants if [said[k] for k in KEY] in self.only]
            chosen = self.tests_of(function, session.items, tests)
            limit = 90+10*sum(tests[item.nodeid][0] for item in chosen)
            for said,new in mutants:
                work = partial(attempt, module, tree, function, new, chosen, said['kind']=='extra detach')
                found = in_a_fork(work, limit)
                if found=='no mutant': self.void.append([said[k] for k in KEY])
                if found=='no mutant': continue
                row['tried'] += 1
                if found=='killed':
                    row['killed'] += 1
                    self.noticed.append([said[k] for k in KEY])
                elif found: row['survivors'].append(said)
                else: row['survivors'].append(said | dict(late=True)) # a loaded machine decides nothing
                result = 'SURVIVED' if found=='survived' else 'out of time' if found is None else 'killed'
                words = f"{said['function']}:{said['line']} {said['kind']}: {said['before']} -> {said['after']}"
                print(f"{self.name} {row['tried']}: {result}  {words}", flush=True)
        files = sorted({Path(item.fspath).name for item in session.items})
        self.row = row | dict(seconds=round(time.perf_counter()-start), tests=files)
        return True

    def tests_of(self, function, items, tests):
        "Tests that call a function, or something in it, short ones first; at first only so many as fit the budget"
        def calls(item): return any(f==function or f.startswith(function+'.') for f in tests[item.nodeid][2])
        chosen = [item for item in items if calls(item)]
        chosen.sort(key=lambda item: tests[item.nodeid][0])
        if self.only is not None: return chosen
        total,first = 0.,[]
        for item in chosen:
            total += tests[item.nodeid][0]
            if total>BUDGET and first: break
            first.append(item)
        return first

def attempt(module, tree, function, new, items, detaches):
    "Swap the code of a function, and run tests until one fails"
    body = copy.deepcopy(tree)
    dict(functions_of(body))[function].body = new.body
    try: target_of(module, function).__code__ = code_of(body, function)
    except ValueError: return 'no mutant' # it has other free variables
    for item,following in zip_longest(items, items[1:]):
        if failed(item, following): return 'killed'
    return 'no mutant' if detaches and not GRADIENTS else 'survived' # nothing had a gradient to take away

def score(name, per, seed, only=None, beyond=False):
    "Break a module's functions `per` times each; a row that counts what was noticed and lists what was not"
    import pytest
    plugin = Mutation(name, per, seed, only, beyond)
    files = [str(ROOT/'tests'/f'test_{part}.py') for part in TESTS[name].split()]
    pytest.main(['-q', '-p', 'no:cacheprovider', '-m', 'not processes', *files], plugins=[plugin])
    return plugin.row | dict(noticed=plugin.noticed, void=plugin.void)

def read_rows():
    rows = map(json.loads, RESULTS.read_text().splitlines()) if RESULTS.exists() else ()
    return {row['module']:row for row in rows}

def write_row(row):
    row = {k:v for k,v in explained(row).items() if k not in ('noticed','void')}
    rows = read_rows() | {row['module']:row} # read again just before: another module may have ended meanwhile
    RESULTS.write_text(''.join(json.dumps(rows[name], ensure_ascii=False)+'\n' for name in sorted(rows)))

EQUIVALENT = { # changes that mean nothing: part of a module and function, of what was, and why
    ('embeddings nearest_class_similarity', '2 in -2'):"any number below -1 hides a class",
    ('embeddings within_class_share', '1e-12'):"a guard against 0/0, which no set of directions comes near",
    ('embeddings lookalike_pairs', '< least - 1e-06'):"a slack for rounding, exactly met by chance alone",
    ('norms NormalizeAndProject.__init__', '_growth'):"every fit begins by setting it",
    ('orthogonality _start', 'manual_seed(0)'):"one fixed start is as good as another",
    ('norms NormalizeAndProject.factor', ''):"nothing is added to the loss, so its factor does not count",
    ('norms NormalizeAndProject.close', '__exit__'):"Python closes a context that is dropped",
    ('norms NormalizeAndProject.penalty', 'float32'):"a record of one number, in either type",
    ('norms NormalizeAndProject.load_state_dict', "'growth'"):"every saved state has it",
    ('semantic ISDA.__init__', 'self._loaded = False'):"a first fit has no moments that it could drop",
    ('energy _lengths', 'q <= floor'):"differs only where a length is the bound, and there both slopes are right",
    ('energy _rows', ''):"the size of a tile changes no value",
    ('energy _together', ''):"how many go through at once changes no value",
    ('energy _Energy.setup_context', 'set_materialize_grads'):"zeros for outputs without a gradient cost time alone",
    ('energy _psi', 'form.s == 2'):"the general way gives the same number, and takes longer",
    ('energy _Energy.setup_context', 'mark_non_differentiable'):"nobody differentiates these outputs",
    ('energy MHE.stack_weights', 'len(ws) > 1'):"one tensor, or the same one concatenated",
    ('energy MHE.group_energies', 'False in Form'):"which space is meant is said beside it, layer by layer",
    ('energy _Energy.forward', 'new_empty'):"nobody reads this tensor",
    ('projections group_energy', 'False in enabled'):"nothing here but the energy computes, and it switches autocast off",
    ('stats _has_spread', '1e-12'):"a slack for rounding, exactly met by chance alone",
    ('stats _noncentrality', '10 in 10 +'):"any upper end above the root will do",
    ('stats comparisons', '0 in tables[0]'):"all tables have the same names",
    ('orthogonality squared_cosine', 'n <= d'):"both Gram matrices have the same sum of squares",
    ('embeddings apply_head', 'isinstance(head, _ConvNd) and'):"what is pointwise is a convolution",
    ('embeddings class_means', '1e-12'):"a guard against 0/0: what is divided by is a whole number",
    ('embeddings lookalike_pairs', '1e-09'):"a slack for rounding, exactly met by chance alone",
    ('clustering _Rows.scaled', '< 1e-15'):"exactly met by chance alone",
    ('clustering _silhouette', '1 in blocks=1'):"any centre near the data will do",
    ('clustering _sparsify', 'torch.long'):"numbers that fit either type",
    ('measures.sparsity perplexity', '1 in a.detach'):"what it divides is left out",
    ('measures.sparsity sparsity', 'n > 1'):"of two units that are dead, the formula says 1, too",
    ('measures.sparsity dead_units', 'a.detach()'):"a comparison has no gradient",
    ('measures.sparsity _centred', 'centred.detach()'):"a comparison has no gradient",
    ('measures.sparsity _centred', '<= _NOISE'):"exactly met by chance alone",
    ('measures.sparsity _mean_pair', 'varies[:, None] & varies'):"a channel that does not vary has products of zero",
    ('measures.sparsity filter_correlation', 'm.where(varies, 0)'):"what it leaves is left out of the mean",
    ('measures.sparsity _along', '> floor'):"exactly met by chance alone",
    ('measures.sparsity SparsityMeter.add', '> floor'):"exactly met by chance alone",
    ('measures.sparsity SparsityMeter.add', 'a.detach()'):"nothing there has a gradient",
    ('measures.sparsity SparsityMeter.add', '1e-300'):"0 log 0 is 0 with either",
    ('measures.sparsity SparsityMeter._merge', 'm - mu'):"the other factor adds up to zero",
    ('measures.sparsity SparsityMeter.correlation', '<= _NOISE'):"exactly met by chance alone",
    ('measures.sparsity SparsityMeter.correlation', '1e-100'):"0/0 is avoided by either",
    ('sparsity fastest_rising', '(window - 1) / 2'):"rows are centred, so a shift of the epochs changes no slope",
    ('sparsity fastest_rising', 's.mean'):"the epochs are centred, so a shift of a row changes no slope",
    ('sparsity TargetedSparsity.penalty', 's.detach()'):"a graph that nobody goes back through costs memory alone",
    ('phantom read_labels', '.long'):"numbers that fit either type",
    ('phantoms _weights_of_others', '.detach()'):"which samples are nearest has no gradient",
    ('phantoms phantom_embeddings', 'shares / (total'):"shares add up to 1, or are all 0",
    ('phantoms _pairs', 'labels.sum'):"above zero either way",
    ('comhe CoMHE.steps_of_basis', 'keepdim=True'):"it is added to what has the axis",
    ('sharpness _worst', 'w.detach()'):"a weight without a gradient has no graph",
    ('sharpness norm_measures', 'w.detach()'):"numbers alone are read",
    ('energy _lengths', '1e-66'):"exactly met by chance alone",
    ('energy _dear_to_copy', ''):"how it is computed changes no value",
    ('energy _norms', ''):"both ways give the same lengths, and one is quicker",
    ('energy _phi', '4 in 4 *'):"a bound on a slope that is infinite",
    ('energy _frame', '0 in ws[0]'):"all layers lie on one device",
    ('floats wide', '65504 in'):"rounds to the same number",
    ('floats unit', 'x.detach()'):"directions have no scale, so the gradient of the largest entry adds up to nothing",
    ('floats unit', '1e-24'):"a guard that is far below any direction",
    ('floats unit_together', '1 in largest'):"zeros stay zeros",
    ('effects effects_over_settings', 'sort'):"rows are sorted afterwards",
    ('effects pooled_effects', 'free.where(free > 0)'):"0/0 is NaN either way",
    ('effects effect_claim', "one_of('kind'"):"the claim refuses it, too",
    ('effects effect_claim', '>= bound'):"both formulas give 1 there",
    ('suggest _advice', 'best.cost > 1.2'):"exactly met by chance alone",
    ('optimizer _entries', 'torch.float32'):"a count that fits either type",
    ('subsets split_pool', '0 in max(0'):"less than one image a class is none",
    ('subsets long_tail', 'torch.float64'):"six decimals are right with either",
    ('plain attach._before', 'reg.close()'):"what opens closes first",
    ('plain _Loop.__init__', '500 in total'):"one rhythm of probes is as good as another",
    ('quantities add_noise', 'x + sd * noise'):"noise has no sign",
    ('quantities calibration_error', '.long'):"numbers that fit either type",
    ('quantities relative_energies', '.detach()'):"nothing there has a gradient",
    ('quantities layer_weights', '.detach()'):"nothing there has a gradient",
    ('quantities weight_norm', '.detach()'):"a number alone is read",
    ('quantities _Sparsity.see', 'a.detach()'):"nothing there has a gradient",
    ('quantities _Sparsity.table', '.float'):"a share of few units, rounded either way",
    ('quantities network_quantities', 'seen >= n'):"a further batch of which nothing is taken",
    ('ranking _granulated', '0 in pairs > 0'):"every pair counts twice",
    ('ranking _least_share', '1 in group.max() + 1'):"numbers pairs of groups as well",
    ('ranking _least_share', '1e-12'):"a slack for rounding, exactly met by chance alone",
    ('sparsity TargetedSparsity.sparsities', 'torch.is_grad_enabled()'):"a gradient that nobody asked for costs time alone",
    ('stats answer', "share('level', level)"):"the interval refuses it, too",
    ('stats comparison', "share('level', level)"):"the interval refuses it, too",
    ('measures.sparsity perplexity', 'a.detach()'):"perplexity has no scale, so the gradient of the largest entry adds up to nothing",
    ('measures.sparsity sparsity', 'a.detach()'):"a comparison has no gradient",
    ('measures.sparsity _responses', 'a.abs()'):"what follows takes absolute values",
    ('measures.sparsity _along', '1e-300'):"0 log 0 is 0 with either",
    ('measures.sparsity measure_sparsity', 'n_batches += 1'):"only whether it is zero counts",
    ('measures.sparsity _alive', '> _floor'):"exactly met by chance alone",
    ('sparsity fastest_rising', '1 in s.mean'):"takes the same from the slope of every layer",
    ('sparsity fastest_rising', '1 in window - 1'):"rows are centred, so a shift of the epochs changes no slope",
    ('sparsity TargetedSparsity.setup', "self.over == 'samples'"):"acts on several processes alone: test_distributed.py",
    ('sparsity TargetedSparsity.open', 'self.close()'):"Python closes a context that is dropped",
    ('sparsity TargetedSparsity._leave', '__exit__'):"Python closes a context that is dropped",
    ('phantom ClassQueue.__init__', 'torch.long'):"numbers that fit either type",
    ('phantom EmbeddingRegularizer.open', 'self.close()'):"Python closes a context that is dropped",
    ('phantom EmbeddingRegularizer.close', '__exit__'):"Python closes a context that is dropped",
    ('clustering _exact', 'enabled'):"a decorator has run before it is changed; changed in the file it fails test_parity",
    ('clustering _exact', 'no_grad'):"activations are detached before",
    ('clustering _as_tensor', 'return'):"what it gives is detached next",
    ('clustering _matrix', 'detach'):"what follows has no gradient either way",
    ('clustering _Gram.add', '1 in square.shape[1]'):"squares have equal sides",
    ('clustering unit_variance_ratio', 'sums.sum'):"number and sums are divided alike",
    ('clustering _percentile', 'columns.numel() > 8 * _BLOCK'):"both ways give the same number; which one costs less memory is for test_scale.py",
    ('energy energies_together', '0 in ws[0]'):"all layers lie on one device",
    ('projections projected_energies', 'False in half_space'):"which space is meant is said beside it, stack by stack",
    ('projections _prepare', '65504 in'):"float16 rounds it to the same number",
    ('comhe CoMHE.make_basis', 'weight.detach'):"nothing but its type and device is read",
    ('comhe CoMHE.stack_energies', 'False in Form'):"which space is meant is said beside it, stack by stack",
    ('phantoms check_labels', 'torch.long'):"labels that nobody reads",
    ('phantoms _average', '2.0 in -2.0'):"any number below the least cosine",
    ('phantoms phantom_loss', 'torch.no_grad'):"whether a sample is right has no gradient",
    ('core Regularizer.write_state', '60 in'):"two numbers by chance alike are as rare with either",
    ('core ActivationRegularizer.open', 'self.close()'):"Python closes a context that is dropped",
    ('core ActivationRegularizer.close', '__exit__'):"Python closes a context that is dropped",
    ('kinds SecondPass._pass', 't.detach()'):"a copy that is read once, and dropped",
    ('contract _learner', '0.05 in lr'):"one small step is as good as another",
    ('contract _learner', '0.9 in mom'):"any momentum gives the optimizer a state",
    ('contract _learner', '0 in torch.manual_seed'):"one fixed start is as good as another",
    ('contract _learner', '0 in seed'):"64 digits are as good as others",
    ('contract _learner', '20 in n_valid'):"one image more to validate on",
    ('contract _learner', '4 in :4'):"a ReLU has no parameters",
    ('contract _learner', '4 in 4:'):"a ReLU has no parameters",
    ('contract _learner', '3 in nn.Conv2d'):"one small network is as good as another",
    ('contract _close', '1e-08 in'):"a guard for zeros, far below any gradient",
    ('contract _close', '<= bound'):"exactly met by chance alone",
    ('contract _trained', '2 in learn.fit'):"two epochs or three, the same for both",
    ('contract _leaves_no_trace', '1 in learn.fit'):"one epoch or two, the same for both",
    ('contract _loss_is_data', '1 in toy(cb).fit'):"one epoch or two to look at",
    ('contract _hooks_go', '1 in learn.fit'):"one epoch or two to look at",
    ('contract _hooks_go', '100 in'):"ahead of all others, or behind them",
    ('contract _fits_or_refuses', '1 in learn.fit'):"one epoch or two",
    ('contract _lives_with_fastai', '4 in learn.fit'):"the finder ends after six batches",
    ('contract _lives_with_fastai', '6 in num_it'):"six batches or seven",
    ('contract _resumes', '4 in part.fit'):"it stops in its third epoch",
    ('contract _refuses', '1 in batches.append'):"how many there are counts, not what they are",
    ('contract _trained', '1 in torch.manual_seed'):"one fixed start is as good as another",
    ('contract _step', '1 in learn.fit'):"the spy ends the fit at its first step",
    ('contract _break_at', '1 in learn.fit'):"the fit breaks in its first epoch",
    ('contract _loss_is_data', '10.0 in'):"a penalty in the loss shows at either weight",
    ('contract _degenerate', '1000.0 in'):"either bias silences every unit",
    ('contract _fits_or_refuses', '1 in batches.append'):"how many there are counts, not what they are",
    ('contract _lives_with_fastai', 'False in stop_div'):"wherever the finder stops, the weights have to come back",
    ('contract _refuses', '1.0 in -1.0'):"one negative weight is as good as another",
    ('contract check_regularizer', '0.0 in lam=0.0'):"only whether it takes lam counts",
    ('energy hyperspherical_energy', 'grad=False'):"the gradient that nobody asked for costs time alone",
    ('semantic ISDA.outputs', 'z.detach()'):"moments are detached when they are merged",
    ('semantic ISDA.outputs', '.long'):"numbers that fit either type",
    ('sharpness _sample', '0 in batch[0]'):"a batch has as many labels as inputs",
    ('sharpness _bisect', '1.002'):"exactly met by chance alone",
    ('sparsity_monitor LayerMeters.open', 'self.close()'):"Python closes a context that is dropped",
    ('sparsity_monitor LayerMeters.close', '__exit__'):"Python closes a context that is dropped",
    ('sparsity_monitor SparsityMonitor.watch', 'counts[split] += 1'):"counts backwards in the same rhythm",
    ('smoothness GradientPenalty.close', '__exit__'):"Python closes a context that is dropped",
    ('smoothness SpectralPenalty.close', '__exit__'):"Python closes a context that is dropped",
    ('smoothness GradientPenalty._values', '.long'):"numbers that fit either type",
    ('smoothness spectral_norm', 'manual_seed(0)'):"one fixed start is as good as another",
    ('smoothness SpectralPenalty._norm', 'manual_seed(0)'):"one fixed start is as good as another",
    ('smoothness SpectralPenalty._norm', 'out.detach'):"a vector of length 1 changes at right angles to itself, which adds nothing to the product",
    ('capture _run', 'return outputs'):"outputs are detached where they are read",
    ('ranking _codes', '0 in (len(df), 0)'):"a column of one value splits no group",
    ('ranking _granulated', '.sum(1)'):"what is summed is symmetric",
    ('ranking _information', '1 in np.add.at'):"shares of pairs are the same, however much each counts",
    ('ranking _least_share', 'group[i] * (group.max() + 1)'):"numbers pairs of groups as well: a fraction below 1 and a whole number"}

def explained(row):
    "A row whose survivors say why they mean nothing, where they do"
    def fits(m, place, was): return f"{row['module']} {m['function']}".endswith(place) and was in m['before']
    def why(m): return [text for (place,was),text in EQUIVALENT.items() if fits(m, place, was)]
    return row | dict(survivors=[m | dict(why=why(m)[0]) if why(m) else m for m in row['survivors']])

def again(row):
    "Try the survivors of a row once more"
    def key(m): return [m[k] for k in KEY]
    open_ones = [m for m in explained(row)['survivors'] if 'why' not in m]
    new = score(row['module'], row['per'], row['seed'], [key(m) for m in open_ones])
    gone = [key(m) for m in open_ones if key(m) in new['noticed']]
    void = [key(m) for m in open_ones if key(m) in new['void']] # no gradient to take away after all
    left = [m for m in row['survivors'] if key(m) not in gone+void] # what is not found again stays
    tried,killed = row['tried']-len(void),row['killed']+len(gone)
    return row | dict(survivors=left, tried=tried, killed=killed, tests=new['tests'], again=True)

def all_kinds(row):
    "Go on with a row until every function was broken once in each way that it can be"
    if row.get('kinds'): return row
    new = score(row['module'], row['per'], row['seed'], beyond=True)
    counts = {name:row[name]+new[name] for name in ('tried','killed','survivors','seconds')}
    return new | counts | dict(kinds=True, again=row.get('again', False))

def main(args):
    import hypothesis, torch
    # what children need is loaded once
    for name in ('fastai.vision.all', 'pandas', 'pytest', 'scipy.stats', 'sklearn.metrics'): importlib.import_module(name)
    sys.path.insert(0, str(ROOT/'tests'))
    os.chdir(ROOT)
    torch.set_num_threads(1)
    hypothesis.settings.register_profile('mutation', database=None, derandomize=True, deadline=None)
    hypothesis.settings.load_profile('mutation')
    per = int(args[args.index('--per')+1]) if '--per' in args else 10
    names = [a for a in args if not a.startswith('--') and not a.isdigit()]
    if unknown := [name for name in names if name not in TESTS]: raise SystemExit(f"no such module: {', '.join(unknown)}")
    if '--survivors' in args:
        for row in read_rows().values():
            if row['survivors'] and (not names or row['module'] in names): write_row(again(row))
        return
    for name in names or TESTS:
        new = dict(module=name, per=0, seed=0, tried=0, killed=0, survivors=[], seconds=0)
        write_row(all_kinds(read_rows().get(name, new)) if '--kinds' in args else score(name, per, 0))

if __name__=='__main__': main(sys.argv[1:])
