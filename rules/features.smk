"""Embed every real image, and measure BatchNorm statistics, in one pass."""


@settings_for
def extract_features_settings(w):
    return {}


rule extract_features:
    input:
        description=DESCRIPTION,
        train=real_images,
        teacher=TEACHER,
    output:
        features=FEATURES,
        index=FEATURE_INDEX,
        statistics=BN_STATISTICS,
    params:
        settings=settings_of("extract_features"),
        code=code_of("extract_features"),
        job=describe_job,
    log:
        log_of("extract_features", "{dataset}/{teacher}"),
    benchmark:
        benchmark_of("extract_features", "{dataset}/{teacher}")
    message:
        "Extract features of {wildcards.dataset} with teacher {wildcards.teacher}"
    shell:
        JOB
