"""The input files and the settings of the rules that make images and students, in the order of the graph."""

import math
from types import SimpleNamespace

from rules.plan import DECODERS
from wmdd_core.layouts import is_shown
from wmdd_core.terms import MEASURED_BN_TERMS, SET_TERMS, check_network

# ---- networks --------------------------------------------------------------------------------


def network_entry(block, name, dataset):
    """The settings of a network; one that the images are too small for is told before anything runs."""
    network = without(entry(block, name, dataset), "label")
    try:
        check_network(resolution=dataset_of(dataset)["resolution"], **network)
    except UserError as error:
        stop(f"{block}.{name}, dataset {dataset}: {error}")
    return network


# ---- data ------------------------------------------------------------------------------------


@settings_for
def describe_dataset_settings(w):
    dataset, count = dataset_of(w.dataset), class_total(w.dataset)
    names = class_names(w.dataset)
    return {
        **without(dataset, "title", "teacher", "flip", "store_train", "classes", "download"),
        "classes": count,
        **({"class_folders": digest(names)} if names else {}),
        "seed": config["seed"],
    }


def may_download(wildcards, input):
    """Whether a dataset may be fetched. No setting: it decides whether there are images, not which.

    Snakemake never compares a parameter that reads `input`.
    """
    return int(dataset_of(wildcards.dataset).get("download", False))


@settings_for
def decode_images_settings(w):
    return describe_dataset_settings(w)


# ---- pretrain --------------------------------------------------------------------------------


def real_images(dataset):
    """The decoded training images, where the dataset keeps them; otherwise jobs read its files."""
    return IMAGES.format(dataset=dataset, split="train") if dataset_of(dataset).get("store_train") else []


def decoders(w):
    """Processes that decode training images beside the network, where they are read from their files."""
    return 1 if real_images(w.dataset) else DECODERS


def crops_of(w):
    """What crops of a dataset's training images are cut from: whole files, or decoded centres of them."""
    return "centres" if real_images(w.dataset) else "files"


@functools.cache
def stamp_of(path):
    """A digest of size and time of a file, or of names, sizes and times of all files in a folder.

    Snakemake asks only whether an input is newer than what was made of it: another file that is older, copied
    or renamed with its times, would count as the one before.
    """
    paths, seen = [path] if os.path.isfile(path) else [], set()
    for folder, folders, names in os.walk(path, followlinks=True):
        known = os.path.realpath(folder) in seen  # a link to a folder around it would have no end
        seen.add(os.path.realpath(folder))
        folders[:] = [] if known else filter(is_shown, folders)
        paths += [os.path.join(folder, name) for name in names if is_shown(name)]
    found = [(os.path.relpath(p, path), os.stat(p)) for p in sorted(paths) if os.path.exists(p)]
    return digest([[name, status.st_size, int(status.st_mtime)] for name, status in found])


def given(path, where):
    """A path of the user's, which must be there.

    Snakemake takes what lacks an input as it is if it is there, and would show tables of an earlier configuration.
    """
    path = os.path.expanduser(path)
    if workflow.is_main_process and not os.path.exists(path):
        stop(f"{where}: there is no file or folder {path}; correct it, or put it back")
    return path


def weights_given(w):
    """The file that a teacher is loaded from, where there is one."""
    weights = entry("teachers", w.teacher, w.dataset).get("weights", "torchvision")
    return [] if weights == "torchvision" else given(weights, f"teachers.{w.teacher}.weights")


def weights_stamp(w):
    """Size and time of the file that a teacher is loaded from, as a digest."""
    path = weights_given(w)
    return stamp_of(path) if path else ""


@settings_for
def pretrain_teacher_settings(w):
    teacher = network_entry("teachers", w.teacher, w.dataset)
    if "weights" in teacher:  # its schedule is read for t-SNE's networks alone
        if teacher["weights"] == "torchvision" and not teacher["architecture"].startswith("resnet"):
            stop(
                f"teachers.{w.teacher}.weights: torchvision has none of {teacher['architecture']}; name a file"
            )
        return {**pick(teacher, "architecture", "width", "depth", "weights"), "seed": config["seed"]}
    return {
        **teacher,
        "flip": flips(w.dataset),
        "crops_of": crops_of(w),
        "seed": config["seed"],
    }


# ---- features --------------------------------------------------------------------------------


@settings_for
def extract_features_settings(w):
    return {}


# ---- barycenter ------------------------------------------------------------------------------


def block_of(class_index, dataset):
    """The block of classes that one job handles, as its wildcard: `3`, or `0-49`."""
    size = config.get("classes_per_job", 1)
    first = class_index // size * size
    last = min(first + size, class_total(dataset)) - 1
    return str(first) if first == last else f"{first}-{last}"


@settings_for
def compute_barycenter_settings(w):
    return {**entry("barycenters", w.barycenter, w.dataset), "seed": config["seed"]}


# ---- recover ---------------------------------------------------------------------------------


def sharding_of(w):
    """What decides which images are optimised together."""
    return {"classes": class_total(w.dataset), **pick(method_of(w), "batch_size", "batch_layout")}


def shards_of(w):
    """The shards of a distilled set; only recovery has more than one."""
    if method_of(w)["kind"] != "recover":
        return range(1)
    return range(shard_total(ipc=int(w.ipc), **sharding_of(w)))


def classes_of_shard(w):
    return shard_members(ipc=int(w.ipc), shard=int(w.shard), **sharding_of(w))[0]


def needs_atoms(method):
    """Whether a method matches features with a barycenter."""
    return method["kind"] == "recover" and method["feature_term"] == "barycenter"


def uses_features(method):
    """Whether recovery draws real features: for the terms that compare sets."""
    return method["feature_term"] in SET_TERMS


def uses_statistics(method):
    """Whether recovery matches BatchNorm statistics of the real images; else the teacher's own, or none."""
    return method["bn_term"] in MEASURED_BN_TERMS


def recover_images_input(w):
    method, teacher = method_of(w), teacher_of(w)
    place = {"dataset": w.dataset, "teacher": teacher, "ipc": w.ipc, "barycenter": method.get("barycenter")}
    files = {"description": DESCRIPTION.format(**place), "teacher": TEACHER.format(**place)}
    if uses_statistics(method):
        files["statistics"] = BN_STATISTICS.format(**place)
    if needs_atoms(method):
        blocks = dict.fromkeys(block_of(c, w.dataset) for c in classes_of_shard(w))
        files["barycenters"] = [BARYCENTER.format(**place, block=b) for b in blocks]
    if uses_features(method):
        files |= {"features": FEATURES.format(**place), "index": FEATURE_INDEX.format(**place)}
    if method["start"] == "real":
        files["train"] = real_images(w.dataset)
    return files


@settings_for
def recover_images_settings(w):
    method = method_of(w)
    if method.get("crop_scale_start", math.inf) <= method["crop_scale_min"]:
        stop(f"methods.{w.method}.crop_scale_start: crops shrink from it to crop_scale_min; lower that")
    if method["feature_term"] == method["bn_term"] == "none" and not method.get("ce_weight"):
        stop(f"methods.{w.method}: feature_term and bn_term are none, nothing is matched; set one")
    teacher = teacher_of(w)
    architecture = entry("teachers", teacher, w.dataset)["architecture"]
    if method["bn_term"] != "none" and architecture.startswith("vit"):
        stop(f"methods.{w.method}: its teacher {teacher} has no BatchNorm layer; set bn_term: none")
    unread = {
        "ce_weight": method["feature_term"] == "cross_entropy",
        "real_batch": method["feature_term"] not in SET_TERMS,
        "directions": method["feature_term"] != "sliced_wasserstein",
        "first_bn_multiplier": method["bn_term"] == "none",
    }
    if method["bn_term"] == "none":  # its weight is no reason to recover again
        method = {**method, "lambda_bn": 0}
    return {
        "flip": flips(w.dataset),
        **without(
            method,
            *("kind", "label", "teacher", "barycenter", "swept", "batch_size", "batch_layout"),
            *(key for key, is_so in unread.items() if is_so),
        ),
        "sharding": sharding_of(w),
        "seed": seed_of(w),
    }


def select_images_input(w):
    files = {"description": DESCRIPTION.format(dataset=w.dataset), "train": real_images(w.dataset)}
    if method_of(w)["selection"] == "kmeans":
        place = {"dataset": w.dataset, "teacher": teacher_of(w)}
        files |= {"features": FEATURES.format(**place), "index": FEATURE_INDEX.format(**place)}
    return files


@settings_for
def select_images_settings(w):
    return {**pick(method_of(w), "selection"), "seed": seed_of(w)}


def distil_baseline_input(w):
    return {"description": DESCRIPTION.format(dataset=w.dataset), "train": real_images(w.dataset)}


@settings_for
def distil_baseline_settings(w):
    method = method_of(w)
    augmentation = method["augmentation"]
    if augmentation and flips(w.dataset) and "flip" not in augmentation:
        augmentation = [*augmentation, "flip"]
    settings = without(method, "label", "network", "swept", "learning_rate_from_ipc_100")
    if int(w.ipc) >= 100 and "learning_rate_from_ipc_100" in method:
        settings["learning_rate"] = method["learning_rate_from_ipc_100"]
    return {
        **settings,
        "augmentation": augmentation,
        "network": network_entry("students", method["network"], w.dataset),
        "seed": seed_of(w),
    }


def external_path(w):
    """Where a set made elsewhere lies."""
    return given(method_of(w)["external"].replace("{ipc}", w.ipc), f"methods.{w.method}.external")


def external_given(w):
    """The file of a set made elsewhere, unless it is a folder, of which another one of its name counts."""
    path = external_path(w)
    return [] if os.path.isdir(path) else path


def external_stamp(w):
    """Names, sizes and times of the files of a set made elsewhere, as a digest."""
    return stamp_of(external_path(w))


@settings_for
def import_images_settings(w):
    return pick(method_of(w), "external")


def gather_images_input(w):
    return [SHARD.format(dataset=w.dataset, method=w.method, ipc=w.ipc, shard=s) for s in shards_of(w)]


@settings_for
def gather_images_settings(w):
    return {}


# ---- relabel ---------------------------------------------------------------------------------


def view_settings(w):
    """What the views of a recipe look like; shared by labelling and training."""
    recipe = entry("recipes", w.recipe, w.dataset)
    return {
        "crop_scale_min": recipe.get("crop_scale_min", 0.08),
        "cutmix": recipe.get("cutmix", False),
        "flip": flips(w.dataset),
        "seed": seed_of(w),
    }


@settings_for
def relabel_images_settings(w):
    recipe = entry("recipes", w.recipe, w.dataset)
    mode = recipe.get("teacher_mode", "eval")
    return {
        "views": view_settings(w),
        "epochs": recipe["epochs"],
        "teacher_mode": mode,
        # The batch reaches the labels through the teacher's BatchNorm alone.
        **(pick(recipe, "batch_size") if mode == "batch" else {}),
    }


# ---- evaluate --------------------------------------------------------------------------------


def evaluate_student_input(w):
    files = {
        "description": DESCRIPTION.format(dataset=w.dataset),
        "test": IMAGES.format(dataset=w.dataset, split="test"),
        "images": DISTILLED.format(dataset=w.dataset, method=w.method, ipc=w.ipc),
    }
    recipe = entry("recipes", w.recipe, w.dataset)
    if recipe["labels"] == "soft":
        place = {"dataset": w.dataset, "recipe": w.recipe, "method": w.method, "ipc": w.ipc}
        files |= {"labels": LABELS.format(**place), "labels_header": LABELS_HEADER.format(**place)}
    if recipe["labels"] == "online":
        if recipe.get("teacher_mode", "eval") != "eval":
            stop(f"recipes.{w.recipe}: labels: online goes with teacher_mode: eval")
        files |= {"teacher": TEACHER.format(dataset=w.dataset, teacher=labeller_of(w.dataset))}
    return files


@settings_for
def evaluate_student_settings(w):
    recipe = entry("recipes", w.recipe, w.dataset)
    unread = ["temperature"] if recipe["labels"] == "hard" else []
    return {
        "recipe": without(recipe, *unread, "label", "crop_scale_min", "cutmix", "teacher_mode"),
        "views": view_settings(w),
        "student": network_entry("students", w.student, w.dataset),
    }


@settings_for
def evaluate_all_real_settings(w):
    if method_of(w)["batch_size"] < 2:
        stop(f"methods.{w.method}.batch_size: BatchNorm cannot train on one image; give it at least 2")
    return {
        "recipe": without(method_of(w), "kind", "label", "swept"),
        "flip": flips(w.dataset),
        "crops_of": crops_of(w),
        "student": network_entry("students", w.student, w.dataset),
        "seed": config["seed"],
    }


# ---- what lies behind a job ------------------------------------------------------------------


MAKERS = {
    "recover": "recover_images",
    "select": "select_images",
    "dm": "distil_baseline",
    "dc": "distil_baseline",
    "external": "import_images",
}
"""Kind of a method → the rule that makes its images."""


def steps_before(step, w):
    """The steps whose artefacts a job of rule `step` reads, as (rule, wildcards that decide on their settings)."""
    data = {"dataset": w.dataset}
    if step == "describe_dataset":
        return []
    if step in ("decode_images", "import_images"):
        return [("describe_dataset", data)]
    images = [("decode_images", data)]
    if step in ("pretrain_teacher", "distil_baseline", "evaluate_all_real"):
        return images
    if step == "extract_features":
        return [("pretrain_teacher", {**data, "teacher": w.teacher})]
    if step == "compute_barycenter":
        return [("extract_features", {**data, "teacher": w.teacher})]
    method, teacher, place = method_of(w), {**data, "teacher": teacher_of(w)}, {**data, "method": w.method}
    if step == "select_images":
        return [*images, ("extract_features", teacher)] if method["selection"] == "kmeans" else images
    if step == "recover_images":
        embedded = needs_atoms(method) or uses_features(method) or uses_statistics(method)
        found = [*images, ("extract_features" if embedded else "pretrain_teacher", teacher)]
        if needs_atoms(method):
            found.append(("compute_barycenter", {**teacher, "barycenter": method["barycenter"]}))
        return found
    if step == "gather_images":
        return [(MAKERS[method["kind"]], {**place, "ipc": w.ipc})]
    sets, labeller = ("gather_images", {**place, "ipc": w.ipc}), {**data, "teacher": labeller_of(w.dataset)}
    if step == "relabel_images":
        return [sets, ("pretrain_teacher", labeller)]
    labels = entry("recipes", w.recipe, w.dataset)["labels"]
    return {
        "soft": [("relabel_images", {**place, "ipc": w.ipc, "recipe": w.recipe})],
        "online": [sets, ("pretrain_teacher", labeller)],
        "hard": [sets],
    }[labels]


@functools.cache
def behind(step, **wildcards):
    """A digest of the settings and the code of every step behind a job, and of folders made elsewhere.

    A folder is no input, by whose time what was made of it would count as outdated.
    """
    found = []
    for rule, place in steps_before(step, SimpleNamespace(**wildcards)):
        w = SimpleNamespace(**place)
        in_folder = rule == "import_images" and os.path.isdir(external_path(w))
        files = [external_stamp(w)] if in_folder else []
        found.append([SETTINGS[rule](w), code_of(rule), behind(rule, **place), *files])
    return digest(found)


def behind_of(step):
    """A rule's parameter that changes with any step before it.

    A job that fails by new settings leaves no output that Snakemake could see to be outdated, and what was
    made of the old one stays as it is: without this, it would count as up to date.
    """
    return lambda w: behind(step, **dict(w.items()))
