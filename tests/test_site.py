"The docs site in a real browser, every page, wide and narrow: it loads, fits, is typeset, can be read and searched."
import os, re, shutil, subprocess, sys
from contextlib import contextmanager
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from threading import Thread
from urllib.parse import unquote, urldefrag, urljoin

import pytest
from test_project import NBS, ROOT, copy_tree, module_of, tool

CDN = 'https://cdn.jsdelivr.net/npm/katex@'
WIDTHS = dict(wide=1400, narrow=390) # a desk's screen and a telephone's, in pixels
ARGS = '--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync'.split()
PAGES = {p.relative_to(ROOT/'nbs').with_suffix('.html').as_posix():p for p in NBS}


def needed(what, found):
    "Skip where a tool is missing, but fail on CI, where it has to be there."
    if found: return found
    (pytest.fail if os.environ.get('CI')=='true' else pytest.skip)(f'{what} is missing: .ci/run installs it on Debian')

@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "The folder of the built site: $SITE where it was built just now, else built from a copy of the project."
    if os.environ.get('SITE'): return (ROOT/os.environ['SITE']).resolve()
    root = copy_tree(tmp_path_factory.mktemp('project'))
    tool(root, sys.executable, '-W', 'ignore', 'tests/docs.py')
    return root/'_docs'

class Page(HTMLParser):
    "The links, the identifiers and the pictures of a page."
    def __init__(self, path):
        super().__init__()
        self.links,self.ids,self.images = [],set(),[]
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if 'id' in attrs: self.ids.add(attrs['id'])
        if tag=='a' and attrs.get('href'): self.links.append(attrs['href'])
        if tag=='img': self.images.append(attrs.get('src') or '')

@pytest.fixture(scope='session')
def pages(site): return {p.relative_to(site).as_posix():Page(p) for p in site.rglob('*.html')}


def test_the_readme_is_short():
    assert len((ROOT/'README.md').read_text(encoding='utf-8').splitlines())<=120, 'move what is long to pages of its own'

def test_every_notebook_is_a_page(pages):
    assert PAGES.keys()<=pages.keys()
    unlisted = PAGES.keys()-set(pages['pages.html'].links)-{'index.html','pages.html'}
    assert not unlisted, f'run nbdev-test nbs/pages.ipynb --save: {sorted(unlisted)}'

def public_names(path):
    "Functions and classes that a notebook exports."
    module = module_of(path)
    if module is None: return []
    members = {name:getattr(import_module(module), name) for name in import_module(module).__all__}
    return [name for name,what in members.items() if callable(what) and getattr(what, '__module__', '')==module]

def test_every_public_name_has_its_entry(site, pages):
    "On its module's page, with a link to its source; the reference leads there"
    reference,missing = set(pages['reference.html'].links),[]
    for page,path in PAGES.items():
        text = (site/page).read_text(encoding='utf-8')
        for name in public_names(path):
            entry = re.search(rf'#L-\d+"[^>]*>source</a></p>\s*<h3 [^>]*>{name}<', text)
            if not (entry and f'{page}#{name.lower()}' in reference): missing.append((page, name))
    assert not missing, f'run nbdev-export and nbdev-test nbs/reference.ipynb --save: {missing}'

def test_links_and_anchors_lead_somewhere(site, pages):
    dead = []
    for name,page in pages.items():
        for href in page.links:
            if re.match(r'[a-z]+:|//', href): continue
            to,anchor = urldefrag(urljoin(f'/{name}', href))
            to = unquote(to).lstrip('/') or 'index.html'
            if to.endswith('/'): to += 'index.html'
            if not (site/to).is_file(): dead.append((name, href))
            elif anchor and to in pages and unquote(anchor) not in pages[to].ids: dead.append((name, href))
    assert not dead, dead

def test_links_are_whole(site):
    "A name in backticks becomes a link by itself: inside brackets it spoils the link around it"
    assert not [page.name for page in site.rglob('*.html') if '</a>](' in page.read_text()]

def test_pictures_are_there(site, pages):
    for name,page in pages.items():
        for src in page.images:
            if src.startswith('data:image/'): assert len(src)>200, f'{name}: an empty picture'
            elif not re.match(r'[a-z]+:', src): assert ((site/name).parent/unquote(src)).stat().st_size>0, (name, src)


@pytest.fixture(scope='session')
def npm(site, tmp_path_factory):
    "Folder of the KaTeX that the pages ask a CDN for, and of axe-core, which judges accessibility; from npm."
    versions = {v for p in site.rglob('*.html') for v in re.findall(rf'{CDN}([\d.]+)', p.read_text(encoding='utf-8'))}
    if not versions: pytest.fail('no page has mathematics')
    command,to = needed('npm', shutil.which('npm')),tmp_path_factory.mktemp('npm')
    cmd = [command, 'install', '--prefix', str(to), '--no-audit', '--no-fund', f'katex@{versions.pop()}', 'axe-core@4']
    out = subprocess.run(cmd, cwd=to, capture_output=True, text=True)
    needed(f'KaTeX from npm ({out.stderr.strip()[-200:]})', out.returncode==0)
    return to/'node_modules'

class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@contextmanager
def serve(folder):
    "Serve a folder on a free port of this machine."
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}'
    finally: server.shutdown()

@pytest.fixture(scope='session')
def browser(site, npm):
    "A function that opens a page of the site and returns it with what went wrong on it."
    sync = pytest.importorskip('playwright.sync_api').sync_playwright
    exe = needed('chromium', shutil.which('chromium') or shutil.which('chromium-browser'))
    with serve(site) as url, sync() as p:
        chromium = p.chromium.launch(executable_path=exe, args=ARGS)
        contexts = {}

        def answer(route):
            "Give KaTeX from npm's files, and nothing else from outside."
            if not route.request.url.startswith(CDN): return route.abort()
            route.fulfill(path=npm/'katex'/re.sub(r'^[\d.]+/', '', route.request.url.removeprefix(CDN)))

        def context(scheme):
            if scheme not in contexts:
                contexts[scheme] = chromium.new_context(viewport=dict(width=WIDTHS['wide'], height=1000), color_scheme=scheme,
                    reduced_motion='reduce') # colours change at once
                contexts[scheme].route(lambda to: not to.startswith(url), answer)
            return contexts[scheme]

        def visit(name, scheme='light'):
            page,errors = context(scheme).new_page(),[]
            page.on('pageerror', lambda e: errors.append(str(e)))
            page.on('console', lambda m: m.type=='error' and errors.append(m.text))
            page.on('response', lambda r: r.status>=400 and errors.append(f'{r.status} {r.url}'))
            response = page.goto(f'{url}/{name}', wait_until='load')
            assert response.status==200
            page.wait_for_function("performance.getEntriesByName('first-contentful-paint').length")
            return page,errors

        yield visit
        chromium.close()

LOOK = """() => {
  const width = document.documentElement, seen = e => e.offsetParent !== null, main = document.querySelector('main');
  const prose = main.cloneNode(true);
  prose.querySelectorAll('pre, code, .katex, script, style').forEach(e => e.remove());
  return {
    over: width.scrollWidth - innerWidth,
    widest: [...main.querySelectorAll('*')].filter(e => seen(e) && e.getBoundingClientRect().right > innerWidth+1 && !e.closest('table, .katex, pre, .sd-table, .cell-output-display'))
      .slice(0, 3).map(e => e.outerHTML.slice(0, 120)),
    cut: [...main.querySelectorAll('pre')].filter(e => seen(e) && e.scrollWidth > e.clientWidth+2).length,
    images: [...main.querySelectorAll('img')].map(i => [i.src.slice(0, 60), i.alt, i.complete, i.naturalWidth, i.naturalHeight, i.getAttribute('width'), i.getAttribute('height')]),
    katex: document.querySelectorAll('.katex').length,
    wrong: [...document.querySelectorAll('.katex-error')].map(e => e.title),
    left: (prose.textContent.match(/\\$\\$|\\\\(?:frac|begin|sum|left)\\b/g) || []),
    paint: performance.getEntriesByName('first-contentful-paint')[0].startTime,
    bytes: ['navigation', 'resource'].flatMap(t => performance.getEntriesByType(t)).reduce((sum, e) => sum + e.decodedBodySize, 0),
  }}"""
RULES = ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa'] # axe-core's names for the rules of WCAG 2.1, levels A and AA

def accessibility(page, npm, rules=RULES):
    "What axe-core finds wrong on a page, a line a place."
    if not page.evaluate("'axe' in window"): page.evaluate((npm/'axe-core/axe.min.js').read_text(encoding='utf-8'))
    found = page.evaluate("rules => axe.run(document, {runOnly: rules, resultTypes: ['violations']})", rules)
    return [f"{v['id']}: {n['html'][:110]} ({n['any'][0]['message'][:120] if n['any'] else ''})" for v in found['violations'] for n in v['nodes'][:3]]

def lightness(page):
    "The sum of the red, green and blue of the page's ground, in 0 to 765."
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r'\d+', back)[:3]))

@pytest.fixture(scope='session')
def looks(browser, npm):
    "What is seen of every page: name -> (errors, what a wide and a narrow window show, what axe-core finds in each)."
    found = {}
    for name in PAGES:
        page,errors = browser(name)
        look,wrong = {},{}
        for width,pixels in WIDTHS.items():
            page.set_viewport_size(dict(width=pixels, height=1000))
            look[width],wrong[width] = page.evaluate(LOOK),accessibility(page, npm)
        found[name] = errors,look,wrong
        page.close()
    return found

def each(looks, width, what): return {name:look[width][what] for name,(_,look,_) in looks.items() if look[width][what]}

def test_pages_load_without_errors(looks): assert not {name:errors for name,(errors,*_) in looks.items() if errors}

@pytest.mark.parametrize('width', WIDTHS)
def test_nothing_is_cut_off_at_the_side(looks, width):
    "Code, tables and equations fit the column or scroll inside it"
    over = {name:(px, looks[name][1][width]['widest']) for name,px in each(looks, width, 'over').items() if px>1}
    assert not over and not each(looks, width, 'cut'), (over, each(looks, width, 'cut'))

def test_pictures_are_drawn_and_described(looks):
    "A picture has words for who does not see it, and its size for the text below, which must not move"
    bad = [(name, picture) for name,pictures in each(looks, 'wide', 'images').items() for picture in pictures
        if not (len(picture[1])>5 and picture[2] and picture[3]>1 and picture[3:5]==[int(size or 0) for size in picture[5:]])]
    assert not bad, bad

def test_all_mathematics_is_typeset(looks):
    assert len(each(looks, 'wide', 'katex'))>10
    assert not each(looks, 'wide', 'wrong') and not each(looks, 'wide', 'left'), (each(looks, 'wide', 'wrong'), each(looks, 'wide', 'left'))

@pytest.mark.parametrize('width', WIDTHS)
def test_pages_can_be_read_by_everybody(looks, width):
    "Names, roles, contrast and the keyboard, by axe-core's rules for WCAG 2.1"
    assert not (found := {name:wrong[width] for name,(*_,wrong) in looks.items() if wrong[width]}), found

def test_dark_pages_can_be_read_too(browser, npm):
    "Who asks for dark pages gets them, with contrast enough"
    found = {}
    for name in PAGES:
        page,errors = browser(name, 'dark')
        wrong = accessibility(page, npm, ['color-contrast'])
        if errors or wrong or lightness(page)>200: found[name] = errors,wrong,lightness(page)
        page.close()
    assert not found, found

def test_pages_are_light(looks):
    "With all that they load from the site"
    heavy = {name:round(size/1e6, 2) for name,size in each(looks, 'wide', 'bytes').items() if size>1.5e6}
    assert not heavy, f'MB: {heavy}'

def test_pages_are_quick(looks, browser):
    "Something is seen within a second; a page that was late is asked again, in case it was the machine"
    def paint(name):
        page,_ = browser(name)
        time = page.evaluate(LOOK)['paint']
        page.close()
        return time
    late = {name:time for name,time in each(looks, 'wide', 'paint').items() if time>1000} # milliseconds
    assert len(late)<len(PAGES)/2 and not (slow := [name for name in late if min(paint(name) for _ in range(3))>1000]), slow

def test_sidebar_shows_every_page(browser):
    page,_ = browser('index.html')
    links = page.locator('#quarto-sidebar a.sidebar-link')
    hrefs = {links.nth(i).get_attribute('href') for i in range(links.count())} - {None}
    assert {re.sub(r'^\./', '', h) for h in hrefs}>=PAGES.keys()
    page.locator('#quarto-sidebar a.sidebar-link', has_text='The base class').first.click()
    page.wait_for_url('**/core.html')
    page.close()

def test_code_stands_on_its_page_and_source_links_lead_to_the_line(browser, site):
    "Private mathematics is shown, and a click on [source] lands on the definition"
    page,errors = browser('regularizers/energy.html')
    assert 'def _psi(' in page.locator('main').inner_text() and 'def _energy_grad(' in page.locator('main').inner_text()
    link = page.locator('a', has_text='source').filter(visible=True).first
    href = link.get_attribute('href')
    lines = (site/'regularizers'/href.partition('#')[0]).resolve()
    module,number = lines.relative_to((site/'source').resolve()).with_suffix('.py'),int(href.rpartition('-')[2])
    assert re.match(r'(@|class |def )', (ROOT/module).read_text(encoding='utf-8').splitlines()[number-1])
    opened,errors = browser(os.path.relpath(lines, site.resolve()))
    assert opened.locator(f'#L-{number}').count()==1 and not errors
    opened.close()
    page.close()

@pytest.mark.parametrize('word,where', [('CoMHE', 'comhe'), ('c3', 'intraclass|clustering'), ('onset', 'sparsity'), ('create_model', 'models')])
def test_search_finds_and_the_keyboard_is_enough(browser, npm, word, where):
    "`/` goes to the search box, arrows choose, Enter opens; what is found can be read"
    page,errors = browser('core.html')
    page.keyboard.press('/')
    page.keyboard.type(word)
    page.wait_for_selector('.search-result')
    hrefs = page.eval_on_selector_all('.search-result', 'es => es.map(e => e.getAttribute("href"))')
    assert any(re.search(where, href) for href in hrefs), hrefs
    assert not (wrong := accessibility(page, npm, ['color-contrast'])), wrong
    page.keyboard.press('ArrowDown')
    page.keyboard.press('Enter')
    page.wait_for_url(lambda url: hrefs[0].removeprefix('./').partition('#')[0] in url)
    assert not errors
    page.close()

def press_until(page, selector, most=20):
    "Press Tab until what `selector` names has the focus."
    for _ in range(most):
        page.keyboard.press('Tab')
        if page.evaluate("selector => document.activeElement.matches(selector)", selector): return
    pytest.fail(f'Tab does not reach {selector}')

def test_keyboard_skips_the_menus(browser):
    page,_ = browser('core.html')
    press_until(page, '.skip', 1)
    assert page.evaluate("document.activeElement.getBoundingClientRect().top")>=0
    page.keyboard.press('Enter')
    page.keyboard.press('Tab')
    assert page.evaluate("document.activeElement.closest('main') !== null")
    page.close()

def test_keyboard_opens_the_menus(browser):
    "Of a wide page a section of the sidebar; of a narrow one the sidebar; the colours are switched, and kept"
    page,_ = browser('index.html')
    press_until(page, '.quarto-color-scheme-toggle')
    page.keyboard.press('Enter')
    page.reload()
    assert page.evaluate("document.documentElement.classList.contains('quarto-dark')")
    press_until(page, '.quarto-color-scheme-toggle')
    page.keyboard.press('Enter')
    press_until(page, '#quarto-sidebar [aria-expanded]')
    section = page.evaluate("document.activeElement.dataset.bsTarget")
    for state in ('.collapse:not(.show)', '.show'): # closed, and open again
        page.keyboard.press('Enter')
        page.wait_for_selector(section+state, state='attached')
    page.set_viewport_size(dict(width=WIDTHS['narrow'], height=800))
    page.reload() # the focus is at the top again
    press_until(page, '.quarto-btn-toggle')
    page.keyboard.press('Enter')
    page.wait_for_selector('#quarto-sidebar.show')
    page.close()

def test_keyboard_reaches_the_text(browser):
    "Tab moves the focus over links that can be seen, and the place is marked"
    page,_ = browser('index.html')
    for _ in range(6): page.keyboard.press('Tab')
    shown = page.evaluate("() => {const e = document.activeElement, s = getComputedStyle(e); return [e.tagName, s.outlineStyle, s.boxShadow]}")
    assert shown[0] in ('A','BUTTON','INPUT','SUMMARY') and (shown[1]!='none' or shown[2]!='none'), shown
    page.close()
