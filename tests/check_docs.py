"""What README.md and docs/ say, held against the code: python tests/check_docs.py prints what is wrong.

Commands: each one is parsed by its program's own flags and is in tests/commands.txt, with the test that runs it so
or the reason why none does.  Links and anchors lead somewhere.  Nothing is left to be filled in.  Each figure of
README.md stands in RECORDS.md or docs/, those of one row of a table in one line there.  Each name in backticks, of
pages and docstrings, exists.  No sentence is long; README.md is short; no cell of RECORDS.md is a text of its own.

And the modules: no circle of imports that stand at the top of a file.  With --imports it prints who imports whom.
"""
import ast
import dataclasses
import functools
import importlib
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from plumbing.cli import UserError, flag_of, parse

ROOT = Path(__file__).parents[1]
PLACEHOLDER = re.compile(r"\b(TODO|FIXME|XXX|TBD|[A-Z]+_(SECONDS|TABLE|WORDS))\b")
NUMBER = r"\d+(?:,\d{3})+|[-+]?\d+\.\d+"
README_IS_SHORT = True             # True: README.md is held to the four limits below
LINES, WORDS, NUMBERS = 110, 900, 20    # of README.md: wc -l, wc -w, numbers before the first command
SENTENCE = 30                       # words; a span of code is one
CELL = 600                          # characters, of a table in RECORDS.md
AS_IT_WAS = ("plan.md",)            # written before its runs, so its sentences stay

# In backticks, but no names of this code: other people's, and what stands for something
NOT_OURS = set("""
    pass script hf tokenizers transformers torch sentence-transformers scikit-learn matplotlib pyarrow tensorboard
    AutoModel AutoModelForMaskedLM AutoModelForSequenceClassification AutoTokenizer SentenceTransformer MSELoss
    BertTokenizer BertTokenizerFast fill-mask text-classification HF_HUB_OFFLINE=1 torch.func.vmap aot_eager
    nyu-mll/glue all-MiniLM-L6-v2 paraphrase-MiniLM-L3-v2 bert-base-uncased module. _orig_mod. model. .rst .md
    id index label text score LABEL_text LABEL_name __index_level_0__ ##ed _s _t val_mlm val_soft_ce soft_ce
    DIR PATH NAME ENCODER END ID REVISION FILE
""".split())

PROGRAMS = ("train", "prepare", "data", "finetune_glue", "compare", "bench_throughput", "watch", "plumbing.diagnose",
            "tests.simulate", "miniplm")
FOREIGN = ("--nproc-per-node", "--logdir")          # torchrun's, tensorboard's


def pages(root):
    return [root / "README.md", *sorted((root / "docs").glob("*.md")), root / "teacher/README.md"]


def records(root):
    """The archive: what was run, with flags and names of its day."""
    return [root / "RECORDS.md", *sorted((root / "docs/records").glob("*.md"))]


# ------------------------------------------------------------------------------------------------ commands

def documented(text):
    """The shell commands of a page: indented lines, continued ones joined, and what stands in backticks."""
    blocks = re.sub(r" *\\\n *", " ", text)
    for line in re.findall(r"^    *(?:\$ )?(.*)$", blocks, re.M):
        yield from (part.strip() for part in re.split(r"&&|\||>", re.sub(r"  +#.*", "", line)))
    yield from re.findall(r"`((?:[A-Z_]+=\S+ )*(?:python|torchrun) [^`\n]+)`", text)


def program(command):
    """(program, its arguments) of `[VARIABLE=...] python|torchrun [-m] PROGRAM ...`, or None."""
    if not re.match(r"(?:[A-Z_]+=\S+ )*(?:python|torchrun) ", command):
        return None                 # what a command prints, or another program's
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[:1] == ["torchrun"]:
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    else:
        at = 2 if words[1] == "-m" else 1
    return words[at], words[at + 1:]


def config_of(name):
    """(dataclass, help) behind a program's flags; None for one that has no such parser."""
    if (name := name.replace(".py", "")) not in PROGRAMS:
        return None
    module = importlib.import_module(name)
    return module.Config, module.__doc__


def flags_of(config):
    """Every flag that a dataclass gives its program."""
    names = {flag_of(f.name) for f in dataclasses.fields(config)}
    return names | {"--no-" + name[2:] for name in names} | {"--help"}


def command_faults(root):
    lines = (root / "tests/commands.txt").read_text().splitlines()
    listed = dict(re.split(r"  +", line, maxsplit=1) for line in lines if not line.startswith("#"))
    every, found = set(FOREIGN), set()
    for name in PROGRAMS:
        every |= flags_of(config_of(name)[0])
    for page in pages(root):
        text = page.read_text()
        for command in re.findall(r"^((?:[A-Z_]+=\S+ )*(?:python|torchrun) .*\.py.*)$", text, re.M):
            yield f"{page.name}: not indented, so not shown as a command: {command}"
        for code in re.findall(r"`([^`\n]+)`", text):
            for flag in re.findall(r"(?<!\w)--[a-z][a-z0-9-]*", code):
                if flag not in every:
                    yield f"{page.name}: {flag} is a flag of no program here"
        for command in documented(text):
            name, arguments = program(command) or (None, ())
            if not name:
                continue
            flags = sorted({word.partition("=")[0] for word in arguments if word.startswith("-")})
            found.add(shape := " ".join([name, *(arguments if name == "pytest" else flags)]))
            if shape not in listed:
                yield f"{page.name}: {command}: tests/commands.txt has no line for: {shape}"
            if (config := config_of(name)) and "--help" not in flags:
                try:
                    parse(*config, arguments)
                except UserError as e:
                    yield f"{page.name}: {command}: {e}"
    shared = (root / "tests/conftest.py").read_text()
    for shape, why in listed.items():
        if shape not in found:
            yield f"commands.txt: no page has a command such as: {shape}"
        files = re.findall(r"(\S+)::(\w+)", why)
        sources = [(root / f"tests/test_{file}.py").read_text() + shared for file, _ in files]
        for (file, test), source in zip(files, sources, strict=True):
            if f"def test_{test}(" not in source:
                yield f"commands.txt: {shape}: test_{file}.py has no test_{test}"
        for flag in re.findall(r" (--\S+)", shape):
            used = rf"{flag}\b|\b{flag[2:].replace('-', '_')}="
            if re.match(r"\w+::", why) and not re.search(used, "".join(sources)):
                yield f"commands.txt: {shape}: no test that is named there has {flag}"


# ---------------------------------------------------------------------------- links, placeholders, figures

def anchors(page):
    """As GitHub makes them from the headings."""
    heads = re.findall(r"^#+ +(.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def link_faults(root):
    for page in [*pages(root), *records(root)]:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if re.match(r"https?:", link):
                continue
            if not target.exists():
                yield f"{page.name}: the link {link} leads nowhere"
            elif anchor and anchor not in anchors(target):
                yield f"{page.name}: {target.name} has no heading #{anchor}"


def placeholder_faults(root):
    for directory in (".", "docs", "exercises", "plumbing", "teacher"):
        for path in (p for p in (root / directory).glob("*.*") if p.suffix in (".md", ".py")):
            for i, line in enumerate(path.read_text().splitlines(), 1):
                if PLACEHOLDER.search(line):
                    yield f"{path.relative_to(root)}:{i}: a placeholder is left: {line.strip()}"


def figure_faults(root):
    """Of README.md: every number with a point or a thousands comma, and each row of a table as a whole."""
    def numbers(text):
        return set(re.findall(NUMBER, text.replace("**", "")))
    text = (root / "README.md").read_text()
    others = [*records(root), *pages(root)[1:]]
    lines = [line for page in others for line in page.read_text().splitlines()]
    known = [numbers(line) for line in lines]
    for line in re.sub(r"arxiv[ .:/\w]*\d{4}\.\d+|[\d,]+ lines", "", text, flags=re.I).splitlines():
        if missing := numbers(line) - set().union(*known):
            yield f"README.md: {' and '.join(sorted(missing))} not in RECORDS.md or docs/: {line.strip()}"
        if line.startswith("|"):
            cells = line.strip("|").split("|")
            name = cells[0].split("(")[0].strip(" `*")
            for part in line.split(";") if ";" in cells[0] else [line]:
                if len(numbers(part)) > 1 and not any(
                        numbers(part) <= of and (";" in cells[0] or name in there)
                        for of, there in zip(known, lines, strict=True)):
                    yield f"README.md: these figures are in no line of RECORDS.md or docs/ together: {part}"


# -------------------------------------------------------------------------------------------- names in backticks

def sources(root):
    return [p for p in sorted(root.rglob("*.py")) if not {".venv", "data", "runs"} & {*p.relative_to(root).parts}]


@functools.cache
def defined(root):
    """(names, members): every identifier and every string without spaces of the code, and {class or module: what is
    defined in it, its bases' too}.  Of the tests, what they define alone."""
    found, members, bases = set(), {}, {}
    for path in sources(root):
        tree, rel = ast.parse(path.read_text()), path.relative_to(root)
        found |= {path.stem, path.name, str(rel), ".".join(rel.with_suffix("").parts)} | {*rel.parts}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            if isinstance(node, ast.ClassDef | ast.Module):
                name = path.stem if isinstance(node, ast.Module) else node.name
                inside = members.setdefault(name, set())
                bases[name] = [b.id for b in getattr(node, "bases", ()) if isinstance(b, ast.Name)]
                for part in ast.walk(node):
                    inside |= {getattr(part, "name", None), getattr(part, "asname", None)}
                    if isinstance(part, ast.Name | ast.Attribute) and isinstance(part.ctx, ast.Store):
                        inside.add(getattr(part, "id", None) or part.attr)
            if "tests" in rel.parts and not isinstance(getattr(node, "ctx", None), ast.Store):
                continue
            found |= {getattr(node, at, None) for at in ("id", "attr", "arg", "asname")}
            if isinstance(node, ast.alias):
                found |= {*node.name.split("."), node.name}
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and not re.search(r"\s", node.value):
                found |= {node.value, *re.split(r"[/.:,=*{}]", node.value)}
    for name in members:
        for base in bases[name]:
            members[name] |= members.get(base, set())
    return {str(name) for name in found if name}, members


def exists(name, root, page):
    """Whether `name`, a span of code without spaces, is a name of this code, a file, a flag, or an arm's expression."""
    found, members = defined(ROOT)
    name = name.removesuffix("()").rstrip("/")
    if name in found | NOT_OURS or f"test_{name}" in found or re.fullmatch(r"[-+]?[\d.,]+|\W*", name):
        return True
    if any((at / name).exists() for at in (root, page.parent, root / "tests", root / "docs")):
        return True
    if name.endswith("..."):
        return any(each.startswith((name[:-3], f"test_{name[:-3]}")) for each in found)
    owner, dot, attribute = name.rpartition(".")
    if dot and owner.rpartition(".")[2] in members:
        return attribute in members[owner.rpartition(".")[2]]
    if name.startswith("-"):
        return all(flag in every_flag() for flag in re.findall(r"--[a-z][a-z0-9-]*", name))
    parts = re.split(r"[+/:,=@.*]+", name)
    return all(part in {"", *found, *NOT_OURS} or re.fullmatch(r"\d+(e-?\d+)?", part) for part in parts)


@functools.cache
def every_flag():
    return set(FOREIGN).union(*(flags_of(config_of(name)[0]) for name in PROGRAMS))


def name_faults(root):
    texts = [(page, page.read_text()) for page in pages(root)]
    for path in sources(root):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                texts.append((path, ast.get_docstring(node) or ""))
    for page, text in texts:
        for span in re.findall(r"`([^`\n]+)`", re.sub(r"^    .*$", "", text, flags=re.M)):
            parts = [span] if re.fullmatch(r"[^\s(=\"]+(\(\))?", span) else re.findall(r"(?<!\S)--[a-z][a-z-]*", span)
            for name in parts:
                if not exists(name, root, page):
                    yield f"{page.relative_to(root)}: `{name}` is no name here"


# ------------------------------------------------------------------------------------- sentences, and what is short

def sentences(text):
    """Of a page's paragraphs, items, headings and cells, without code; a span of code or a link is its text."""
    text = re.sub(r"\A---\n[\s\S]*?\n---\n|^    .*$|!\[[^]]*\]\([^)]*\)", "", text, flags=re.M)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]+`", "CODE", text)).replace("|", "\n\n")
    for unit in re.split(r"\n\s*\n|\n(?=\s*(?:[-*>#]|\d+\.)\s)", text):
        yield from re.split(r"(?<=[.!?])[\"')*_\]]*\s+", " ".join(unit.split()))


def shown_numbers(text):
    """Before the first command: numbers as a reader sees them, not those in names, links or arXiv's ids."""
    command = r"^    (?:\$ )?(?:[A-Z_]+=\S+ )*(?:python3?|torchrun|pip|hf|git) "
    before = re.split(command, text, maxsplit=1, flags=re.M)[0]
    before = re.sub(r"\]\([^)]*\)|`[^`]*`|arxiv[ .:/\w]*\d{4}\.\d+", "", before, flags=re.I)
    return re.findall(r"(?<![A-Za-z\d._-])[-+]?\d[\d,.]*(?:e-?\d+)?", before)


def length_faults(root):
    for page in pages(root):
        if page.name in AS_IT_WAS or page == root / "README.md" and not README_IS_SHORT:
            continue
        for sentence in sentences(page.read_text()):
            if (count := len(sentence.split())) > SENTENCE:
                yield f"{page.relative_to(root)}: {count} words in a sentence, at most {SENTENCE}: {sentence}"
    text = (root / "README.md").read_text()
    counted = dict(lines=(text.count("\n"), LINES), words=(len(text.split()), WORDS),
                   numbers=(len(shown_numbers(text)), NUMBERS))
    for what, (count, most) in counted.items():
        if README_IS_SHORT and count > most:
            yield f"README.md: {count} {what}, at most {most}"
    for line in (root / "RECORDS.md").read_text().splitlines():
        for cell in line.split("|") if line.startswith("|") else ():
            if len(cell.strip()) > CELL:
                yield f"RECORDS.md: a cell of {len(cell.strip())} characters, at most {CELL}: {cell.strip()[:60]}..."


# ------------------------------------------------------------------------------------------------- imports

def imports(root):
    """({module: our modules that it imports at the top of its file}, the same inside of functions)."""
    files = {".".join(p.relative_to(root).with_suffix("").parts): p
             for folder in (".", "plumbing", "comparison", "exercises") for p in sorted((root / folder).glob("*.py"))}
    top, inside = {name: set() for name in files}, {name: set() for name in files}
    for name, file in files.items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for statement in tree.body:
            nested = isinstance(statement, ast.FunctionDef | ast.ClassDef)
            for node in ast.walk(statement):
                if isinstance(node, ast.Import):
                    meant = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    meant = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                else:
                    continue
                (inside if nested else top)[name].update(m for m in meant if m in files)
    return top, inside


def circle(graph):
    """One circle of a graph, as a list that ends where it begins; [] if there is none."""
    done = set()

    def visit(path):
        if path[-1] in path[:-1]:
            return path[path.index(path[-1]):]
        for other in sorted(graph[path[-1]] - done):
            if found := visit([*path, other]):
                return found
        done.add(path[-1])
        return []
    return next((found for name in sorted(graph) if name not in done and (found := visit([name]))), [])


def import_faults(root):
    if found := circle(imports(root)[0]):
        yield f"a circle of imports: {' -> '.join(found)}"


def picture(root):
    """Who imports whom, by folder: lines of text."""
    for where, graph in zip(("top", "inside a function"), imports(root), strict=True):
        counts = {}
        for name, others in graph.items():
            for other in others:
                pair = tuple(n.partition(".")[0] + "/" if "." in n else "root" for n in (name, other))
                counts.setdefault(pair, []).append(f"{name} -> {other}")
        for (a, b), pairs in sorted(counts.items()):
            few = ": " + ", ".join(sorted(pairs)) if len(pairs) < 9 else ""
            yield f"{where}: {a} imports {b} {len(pairs)} times{few}"


def faults(root=ROOT):
    return [*command_faults(root), *link_faults(root), *placeholder_faults(root), *figure_faults(root),
            *name_faults(root), *length_faults(root), *import_faults(root)]


if __name__ == "__main__":
    if "--imports" in sys.argv:
        print("\n".join(picture(ROOT)))
    found = faults()
    print("\n".join(found), end="\n" if found else "")
    sys.exit(bool(found))
