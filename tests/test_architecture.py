"""Guards of the structure: who imports whom, how long things are, and which names the authors' users import."""

import ast

import pytest
from conftest import ROOT, run_script

MODULES = {path.stem: path for path in ROOT.glob("*.py")}
SOURCES = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items()}

# ---- imports ----

BELOW_DATA = {"dino_shards", "dino_files", "dino_images", "dino_crops", "dino_sample", "dino_checkpoints"}
BELOW_DATA |= {"dino_cli", "utils"}
BELOW_FEATURES = {"dino_features", "dino_data", "dino_backbones", "dino_layouts", "hubconf", "vision_transformer"}
BELOW_FEATURES |= BELOW_DATA | {"dino_cpu", "dino_classifiers"}
# A file imports only these files of ours. utils imports none: its __getattr__ finds public names when they are needed.
ARROWS = {
    "vision_transformer": set(),
    "hubconf": {"vision_transformer"},
    "utils": set(),
    "dino_cli": {"utils"},
    "dino_cpu": set(),
    "dino_layouts": {"vision_transformer", "utils"},
    "dino_checkpoints": {"dino_layouts", "utils"},
    "dino_images": {"utils"},
    "dino_files": {"dino_images", "utils"},
    "dino_crops": {"dino_cli", "dino_images", "utils"},
    "dino_sample": {"dino_images", "utils"},
    "dino_shards": {"dino_files", "dino_images", "utils"},
    "dino_data": BELOW_DATA,
    "dino_backbones": {"vision_transformer", "hubconf", "dino_checkpoints", "dino_cpu", "dino_layouts", "utils"},
    "dino_features": {"dino_data", "dino_crops", "dino_backbones", "dino_checkpoints", "utils"},
    "dino_classifiers": {"dino_checkpoints", "utils"},
    "dino_vectors": {"dino_checkpoints", "utils"},
    "dino_health": {"utils"},
    "dino_linear": {"dino_classifiers", "utils"},
    "dino_signals": {"utils"},
    "dino_ablations": {"dino_cli", "utils"},
    "dino_compile": {"utils"},
    "dino_run": {
        *("dino_features", "dino_data", "dino_files", "dino_health", "dino_signals", "dino_checkpoints"),
        *("dino_cli", "dino_compile", "utils"),
    },
    "main_dino": {
        *("dino_ablations", "dino_run", "dino_backbones", "dino_compile", "dino_data", "dino_crops"),
        *("dino_cli", "vision_transformer", "utils"),
    },
    "run_with_submitit": {"main_dino", "eval_knn", "eval_logistic", *BELOW_FEATURES},
    "dino_steps": {
        *("main_dino", "dino_backbones", "dino_compile", "dino_crops", "dino_cli"),
        *("vision_transformer", "utils"),
    },
    "benchmark": {"main_dino", "dino_steps", "eval_video_segmentation", *BELOW_FEATURES},
}
SCRIPTS = {name for name in MODULES if name.startswith("eval_")}
SCRIPTS |= {"visualize_attention", "video_generation", "export", "report"}
ARROWS |= dict.fromkeys(SCRIPTS, BELOW_FEATURES)
ARROWS["embed"] = {"dino_vectors", *BELOW_FEATURES}
ARROWS["eval_linear"] = {"dino_linear", *BELOW_FEATURES}


def imported(tree):
    """Names of the modules that a syntax tree imports."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]
        else:
            yield from imported(node)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_file_imports_only_what_the_design_allows(name):
    ours = set(imported(ast.parse(SOURCES[name]))) & set(MODULES)
    assert ours <= ARROWS[name], f"{name}.py imports {sorted(ours - ARROWS[name])}"


def test_every_file_has_its_place_and_no_import_goes_in_a_circle():
    assert set(ARROWS) == set(MODULES)
    placed = set()
    while placed != set(ARROWS):
        free = {name for name in set(ARROWS) - placed if ARROWS[name] - {name} <= placed}
        assert free, f"a circle among {sorted(set(ARROWS) - placed)}"
        placed |= free


def test_no_file_has_a_name_that_users_need():
    """They put this folder first on their path."""
    taken = {"datasets", "data", "visualizations", "object_discovery", "knn", "health", "dino"}
    assert not taken & {path.stem for path in ROOT.iterdir()}


# ---- budgets ----

LINES = {"main_dino": 420, "vision_transformer": 380, "utils": 850, "benchmark": 600, "embed": 450}


def budget(name):
    if name in LINES:
        return LINES[name]
    return 600 if name.startswith("dino_") else 450 if name.startswith("eval_") else None


@pytest.mark.parametrize("name", sorted(name for name in MODULES if budget(name)))
def test_a_file_keeps_its_budget_of_lines(name):
    lines = SOURCES[name].count("\n")
    assert lines <= budget(name), f"{name}.py has {lines} lines. Make the code simpler, not the budget larger"


def functions(name):
    nodes = ast.walk(ast.parse(SOURCES[name]))
    return [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_functions_fit_on_a_screen_and_need_six_arguments_at_most(name):
    for function in functions(name):
        lines = function.end_lineno - function.lineno + 1
        most = 100 if "parser" in function.name or "flags" in function.name else 60
        assert lines <= most, f"{name}.{function.name} has {lines} lines"
        arguments = [a.arg for a in function.args.posonlyargs + function.args.args if a.arg not in ("self", "cls")]
        required = len(arguments) - len(function.args.defaults)
        required += sum(default is None for default in function.args.kw_defaults)
        assert required <= 6, f"{name}.{function.name} has {required} required arguments"


def test_more_than_half_of_main_dino_is_the_recipe():
    """Crops, loss, one epoch and the run, of all lines that are not blank."""
    source = SOURCES["main_dino"]
    recipe = source[source.index("# ---- crops") :]
    lines, all_lines = (sum(bool(line.strip()) for line in text.splitlines()) for text in (recipe, source))
    assert lines > all_lines / 2, f"{lines} of {all_lines} lines"


# ---- public names ----

# What the authors' modules export, but for imports of others.
PUBLIC = {
    "utils": """GaussianBlur Solarization load_pretrained_weights load_pretrained_linear_weights clip_gradients
        cancel_gradients_last_layer restart_from_checkpoint cosine_scheduler bool_flag fix_random_seeds SmoothedValue
        reduce_dict MetricLogger get_sha is_dist_avail_and_initialized get_world_size get_rank is_main_process
        save_on_master setup_for_distributed init_distributed_mode accuracy trunc_normal_ LARS MultiCropWrapper
        get_params_groups has_batchnorms PCA compute_ap compute_map multi_scale""",
    "vision_transformer": """drop_path DropPath Mlp Attention Block PatchEmbed VisionTransformer vit_tiny vit_small
        vit_base DINOHead""",
    "main_dino": "get_args_parser train_dino train_one_epoch DINOLoss DataAugmentationDINO",
    "eval_knn": "extract_features knn_classifier",
    "eval_linear": "LinearClassifier",
}


def test_the_authors_public_names_are_importable():
    code = [f"from {module} import {', '.join(names.split())}" for module, names in PUBLIC.items()]
    run_script("-c", "\n".join(code))


def test_an_unknown_name_of_utils_is_an_attribute_error():
    import utils

    with pytest.raises(AttributeError, match="module 'utils' has no attribute 'nothing'"):
        utils.nothing  # noqa: B018
