"""What a dataset holds, and its images decoded once."""


rule describe_dataset:
    output:
        description=DESCRIPTION,
    log:
        log_of("describe_dataset", "{dataset}"),
    benchmark:
        benchmark_of("describe_dataset", "{dataset}")
    conda:
        "../envs/wmdd.yaml"
    params:
        settings=settings_of("describe_dataset"),
        code=code_of("describe_dataset"),
        job=describe_job,
    message:
        "Describe dataset {wildcards.dataset}"
    shell:
        run_script("describe_dataset")


rule decode_images:
    input:
        description=DESCRIPTION,
    output:
        images=IMAGES,
    log:
        log_of("decode_images", "{dataset}/{split}"),
    benchmark:
        benchmark_of("decode_images", "{dataset}/{split}")
    conda:
        "../envs/wmdd.yaml"
    params:
        settings=settings_of("decode_images"),
        code=code_of("decode_images"),
        behind=behind_of("decode_images"),
        job=describe_job,
    message:
        "Decode the {wildcards.split} images of {wildcards.dataset}"
    shell:
        run_script("decode_images")
