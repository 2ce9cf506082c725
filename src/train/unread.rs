//! Keys of a strategy file that nothing reads, beside its other keys: whoever writes one has something else in mind.

use super::Strategy;
use crate::data_parallel::DataParallelConfig;
use crate::pipeline_parallel::PipelineConfig;
use crate::plan::Plan;
use crate::tensor_parallel::TensorParallelConfig;

/// What says that a key is not read, and which one is, if there is such.
pub(super) fn check(strategy: &Strategy) -> Result<(), String> {
    let Strategy { pp, tp, tensor, pipeline, .. } = strategy;
    let wrong = |key: &str, why: String| Err(format!("nothing reads `{key}`: {why}"));
    if *tp == 1 && tensor.plan != Plan::new() {
        return wrong("tensor.plan", "`tp` is 1, so layers are not split: set it, or leave the plan out".into());
    }
    if *pp == 1 && pipeline.is_some() {
        return wrong("pipeline", "`pp` is 1, so there is no pipeline: set it, or leave the table out".into());
    }
    if let (2.., Some(key)) = (*pp, tensor_key(tensor, *tp > 1)) {
        return wrong(&format!("tensor.{key}"), format!("`pp` is {pp}, and steps go by `pipeline.{key}`"));
    }
    if let (2.., 2.., Some(key)) = (*pp, *tp, pipeline.as_ref().and_then(pipeline_key)) {
        let why = format!("`tp` is {tp}, and a pipeline of a split model goes by `tensor.{key}`");
        return wrong(&format!("pipeline.{key}"), why);
    }
    if let (false, Some(key)) = (may_capture(strategy), tensor_key(tensor, false)) {
        let why = "steps are eager, and it is for captured ones: set `engine = \"captured\"`, or leave it out";
        return wrong(&format!("tensor.{key}"), why.into());
    }
    Ok(())
}

/// What says that keys of `[data]` are not read where there is one replica, if there are such. Unlike others they may
/// stay: the same file is for any number of replicas, of which a run that loses ranks may keep one.
pub(super) fn of_one_replica(data: &DataParallelConfig) -> Option<String> {
    let usual = DataParallelConfig::new();
    let keys = [
        ("bucket_bytes", data.bucket_bytes != usual.bucket_bytes),
        ("first_bucket_bytes", data.first_bucket_bytes != usual.first_bucket_bytes),
        ("reduce_dtype", data.reduce_dtype != usual.reduce_dtype),
        ("overlap", data.overlap != usual.overlap),
        ("compare_every", data.compare_every != usual.compare_every),
        ("sharding", data.sharding != usual.sharding),
        ("sharding_ranks", data.sharding_ranks != usual.sharding_ranks),
        ("keep", data.keep != usual.keep),
        ("allow_unused_parameters", data.allow_unused_parameters != usual.allow_unused_parameters),
    ];
    let keys: Vec<String> = keys.iter().filter(|(_, set)| *set).map(|(key, _)| format!("`data.{key}`")).collect();
    (!keys.is_empty()).then(|| format!("nothing reads {}: there is one replica of the model", keys.join(", ")))
}

/// The same strategy without what nothing reads.
pub(super) fn left_out(strategy: &Strategy) -> Strategy {
    let mut read = strategy.clone();
    if read.tp == 1 {
        read.tensor.plan = Plan::new();
    }
    if read.pp == 1 {
        read.pipeline = None;
    }
    match (read.pp, read.tp) {
        (1, _) if may_capture(&read) => {}
        (1, _) | (_, 1) => read.tensor = TensorParallelConfig::new(read.tensor.plan),
        _ => {
            read.tensor.fusion = true;
            read.pipeline.iter_mut().for_each(|pipeline| (pipeline.seed, pipeline.check_inputs_every) = (0, None));
        }
    }
    read
}

/// A setting of captured steps that is not the default, and is not read with a pipeline: of a model that is split as
/// well, less.
fn tensor_key(tensor: &TensorParallelConfig, split: bool) -> Option<&'static str> {
    let TensorParallelConfig { seed, check_inputs_every, fusion, plan: _ } = tensor;
    match () {
        () if !fusion => Some("fusion"),
        () if split => None,
        () if *seed != 0 => Some("seed"),
        () if check_inputs_every.is_some() => Some("check_inputs_every"),
        () => None,
    }
}

/// A setting of a pipeline that is not the default, and that a split model has as well.
fn pipeline_key(pipeline: &PipelineConfig) -> Option<&'static str> {
    match () {
        () if pipeline.seed != 0 => Some("seed"),
        () if pipeline.check_inputs_every.is_some() => Some("check_inputs_every"),
        () => None,
    }
}

/// Whether steps are captured in some world.
fn may_capture(strategy: &Strategy) -> bool {
    strategy.captured(strategy.dp.unwrap_or(2)).is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_replica_does_not_read_is_named() {
        let data = |toml: &str| toml.parse::<Strategy>().unwrap().data;
        for (key, value) in [
            ("bucket_bytes", "5"),
            ("first_bucket_bytes", "5"),
            ("reduce_dtype", "'BF16'"),
            ("overlap", "false"),
            ("compare_every", "5"),
            ("sharding", "'optimizer'"),
            ("sharding_ranks", "1"),
            ("keep", "'step'"),
            ("allow_unused_parameters", "true"),
        ] {
            let said = of_one_replica(&data(&format!("[data]\n{key} = {value}"))).unwrap();
            assert_eq!(said, format!("nothing reads `data.{key}`: there is one replica of the model"));
        }
        let two = of_one_replica(&data("[data]\noverlap = false\ncompare_every = 5")).unwrap();
        assert!(two.starts_with("nothing reads `data.overlap`, `data.compare_every`: "), "{two}");
        assert_eq!(of_one_replica(&data("[data]\nnoise_scale_every = 4\noverlap = true")), None);
    }
}
