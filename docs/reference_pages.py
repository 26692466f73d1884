"""A MkDocs hook that writes the reference from the docstrings: a page per package, a section per module."""

import ast
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

__all__ = ["on_config", "on_files"]

PACKAGE = "lightning_compress"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the generated pages to the navigation's "Reference" section."""
    section = next(entry["Reference"] for entry in config.nav or [] if "Reference" in entry)
    section.extend(f"reference/{name}.md" for name in _pages(config))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages themselves."""
    for name, text in _pages(config).items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def _pages(config: MkDocsConfig) -> dict[str, str]:
    """Returns the Markdown of each page by the name of the package or module directly under the root."""
    root = Path(config.config_file_path).parent
    pages: dict[str, str] = {}
    for path in sorted((root / PACKAGE).rglob("*.py"), key=_package_first):
        parts = path.relative_to(root).with_suffix("").parts
        if any(part.startswith("_") and part != "__init__" for part in parts) or len(parts) == 1:
            continue
        if parts[1] == "__init__":
            continue  # the root's names are listed by hand in reference/index.md
        pages.setdefault(parts[1], f"# {parts[1]}\n\n")
        pages[parts[1]] += _directive(path, ".".join(part for part in parts if part != "__init__"))
    return pages


def _package_first(path: Path) -> tuple[str, ...]:
    return tuple("" if part == "__init__.py" else part for part in path.parts)


def _directive(path: Path, module: str) -> str:
    """Returns the mkdocstrings block of a module: what it defines, not what it only passes on."""
    members = _own_public_names(ast.parse(path.read_text(encoding="utf-8")))
    listed = "[" + ", ".join(members) + "]" if members else "false"
    return f"::: {module}\n    options:\n      members: {listed}\n\n"


def _own_public_names(tree: ast.Module) -> list[str]:
    public: list[str] = []
    defined: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            if names == ["__all__"] and node.value is not None:
                public = _strings(node.value)
            defined.extend(names)
    return [name for name in defined if name in public]


def _strings(node: ast.expr) -> list[str]:
    return [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
