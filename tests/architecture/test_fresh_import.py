"""What `import lightning_compress` does, and does not do, in a process of its own."""

import subprocess
import sys

import pytest


def run_in_fresh_process(code: str) -> str:
    """Returns what the code printed; fails with its traceback if it raised."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LIGHTNING_LOADED = "print(sorted({'lightning', 'pytorch_lightning'} & set(sys.modules)))"


def test_importing_the_package_registers_the_transformers_quantizer():
    code = (
        "import lightning_compress\n"
        "from transformers.quantizers import auto\n"
        "tables = auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING\n"
        "print(*('lightning_compress' in table for table in tables))"
    )
    assert run_in_fresh_process(code) == "True True"


def test_neither_the_package_nor_what_works_without_lightning_imports_it():
    names = ["Compressor", "CompressionPlan", "load", "save_pretrained"]
    use = f"[getattr(lightning_compress, name) for name in {names}]"
    assert run_in_fresh_process(f"import sys, lightning_compress; {use}; {LIGHTNING_LOADED}") == "[]"


def test_every_public_name_can_be_had_and_is_listed():
    code = (
        "import lightning_compress\n"
        "names = lightning_compress.__all__\n"
        "assert names, 'nothing is public'\n"
        "print([name for name in names if getattr(lightning_compress, name, None) is None])\n"
        "print(sorted(set(names) - set(dir(lightning_compress))))"
    )
    assert run_in_fresh_process(code) == "[]\n[]"


def test_an_unknown_name_is_an_attribute_error_that_names_it():
    import lightning_compress

    with pytest.raises(AttributeError, match="SoftThresholdRankk"):
        _ = lightning_compress.SoftThresholdRankk  # pyright: ignore[reportAttributeAccessIssue]
