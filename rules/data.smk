"""What a dataset holds, and its images decoded once."""


@settings_for
def describe_dataset_settings(w):
    dataset = entry("datasets", w.dataset, w.dataset)
    return {
        **without(dataset, "title", "teacher", "flip", "store_train", "classes"),
        "classes": class_total(w.dataset),
        "seed": config["seed"],
    }


@settings_for
def decode_images_settings(w):
    return describe_dataset_settings(w)


rule describe_dataset:
    output:
        description=DESCRIPTION,
    params:
        settings=settings_of("describe_dataset"),
        code=code_of("describe_dataset"),
        job=describe_job,
    log:
        log_of("describe_dataset", "{dataset}"),
    benchmark:
        benchmark_of("describe_dataset", "{dataset}")
    message:
        "Describe dataset {wildcards.dataset}"
    shell:
        JOB


rule decode_images:
    input:
        description=DESCRIPTION,
    output:
        images=IMAGES,
    params:
        settings=settings_of("decode_images"),
        code=code_of("decode_images"),
        job=describe_job,
    log:
        log_of("decode_images", "{dataset}/{split}"),
    benchmark:
        benchmark_of("decode_images", "{dataset}/{split}")
    message:
        "Decode the {wildcards.split} images of {wildcards.dataset}"
    shell:
        JOB
