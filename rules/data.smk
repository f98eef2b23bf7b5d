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
        **params_of("describe_dataset"),
        download=may_download,
    message:
        "Describe dataset {wildcards.dataset}"
    shell:
        run_script("describe_dataset", "WMDD_DOWNLOAD={params.download} ")


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
        **step_params("decode_images"),
    message:
        "Decode the {wildcards.split} images of {wildcards.dataset}"
    shell:
        run_script("decode_images")
