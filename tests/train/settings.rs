//! Settings that cannot be: what says so, and how.

use std::ops::Range;
use std::time::{Duration, Instant};

use burn::config::{Config, ConfigError};
use burn::optim::{ModuleOptimizer, SgdConfig};
use burn::prelude::*;
use burn::tensor::{FloatDType, TensorData};
use burn_parallel::data_parallel::{Bucket, CastHook, CommHook};
use burn_parallel::params::SliceSource;
use burn_parallel::pipeline_parallel::schedule::Timetable;
use burn_parallel::prelude::*;
use burn_parallel::train::Engine;

use crate::common::checkpointing::own_by;
use crate::common::failing::says;
use crate::common::models::{Numbers, Two, device, two};

fn rows(seed: u64) -> Tensor<2> {
    Numbers(seed + 11).tensor([4, 6], &device())
}

fn loss(model: &Two, x: Tensor<2>) -> Tensor<1> {
    model.forward(x).powi_scalar(2).mean()
}

fn sgd() -> ModuleOptimizer {
    SgdConfig::new().init()
}

fn of_json(json: &str) -> Result<Strategy, Error> {
    let path =
        std::env::temp_dir().join(format!("strategy-{}-{:?}.json", std::process::id(), std::thread::current().id()));
    std::fs::write(&path, json).unwrap();
    let read = Strategy::read(&path);
    std::fs::remove_file(path).unwrap();
    read
}

#[test]
fn wrong_forms_in_a_file_are_told_which_there_are() {
    let plans = ["`megatron`", "`hugging_face`", "`parameters`"];
    let schedules = ["`1f1b`", "`zb_h1`", "interleaved = { stages_per_rank = 2 }"];
    let cuts = ["`balanced`", "before = ["];
    let wrong: [(&str, &[&str], &[&str]); 18] = [
        ("tensor.plan = 'megatrn'", &["no ready plan `megatrn`"], &plans),
        ("tensor.plan = 3", &["integer `3`"], &plans),
        ("tensor.plan = []", &["sequence"], &plans),
        ("tensor.plan = { parameter = [] }", &["unknown field `parameter`"], &plans),
        (
            "tensor.plan = { parameters = [{ pattern = 'a', shards = 1 }] }",
            &["line 1, column 48", "unknown field `shards`", "; the forms are "],
            &plans,
        ),
        (
            "tensor.plan = { parameters = [{ pattern = 'a', shard = 1, replicate = true }] }",
            &[
                "line 1, column 31",
                "pattern `a` needs either `shard`, the number of a dim, or `replicate = true`; the forms are ",
            ],
            &plans,
        ),
        ("tensor.plan = { parameters = [['a', 1]] }", &["sequence", "a table"], &plans),
        ("pipeline = { micro_batches = 2, schedule = 'interleaved' }", &["lacks how many stages"], &schedules),
        ("pipeline = { micro_batches = 2, schedule = 'zb' }", &["ZB-H1 is called `zb_h1`"], &schedules),
        ("pipeline = { micro_batches = 2, schedule = 'fast' }", &["no schedule `fast`"], &schedules),
        ("pipeline = { micro_batches = 2, schedule = 1 }", &["integer `1`"], &schedules),
        ("pipeline = { micro_batches = 2, schedule = { interleaved = {} } }", &["`stages_per_rank`"], &schedules),
        ("pipeline = { micro_batches = 2, schedule = { custom = '0X0' } }", &["`0X0` is no action"], &schedules),
        ("pipeline = { micro_batches = 2, cut = 'evenly' }", &["no cut `evenly`"], &cuts),
        ("pipeline = { micro_batches = 2, cut = ['a'] }", &["sequence"], &cuts),
        ("pipeline = []", &["sequence", "a table"], &[]),
        ("data = { noise_scale = true }", &["unknown field `noise_scale`", "`noise_scale_every`"], &[]),
        ("data = { reduce_dtype = 'flex32' }", &["`flex32`"], &["`BF16`", "`F32`"]),
    ];
    for (toml, what, forms) in wrong {
        let error = toml.parse::<Strategy>().expect_err(toml);
        assert!(matches!(error, Error::Strategy { .. }), "{error}");
        says(&error, what);
        says(&error, forms);
        assert!(!error.to_string().contains("untagged"), "{error}");
    }
    for list in ["[]", "[1, 1, 1]", r#"{"data": []}"#, r#"{"tensor": []}"#, r#"{"pipeline": [4]}"#] {
        says(&of_json(list).expect_err(list), &["sequence", "a table"]);
    }
    assert_eq!(of_json("{}").unwrap().to_string(), Strategy::new().to_string());
    says(&Strategy::read("/dev/null").unwrap_err(), &["/dev/null", "not a file"]);
    says(&Timetable::read("/dev/zero").unwrap_err(), &["/dev/zero", "not a file"]);
}

/// What is wrong deep in a file is shown there, in TOML and in JSON, and not where the table begins.
#[test]
fn what_is_wrong_in_a_table_is_shown_where_it_is() {
    let plan = "tp = 2\n\n[tensor.plan]\nparameters = [\n  { pattern = 'a.*', shard = 1 },\n  RULE\n]\n";
    let listed = "tp = 2\n\n[[tensor.plan.parameters]]\npattern = 'a.*'\nshard = 1\n[[tensor.plan.parameters]]\nRULE\n";
    let cut = "pp = 2\n[pipeline]\nmicro_batches = 4\ncut = RULE\n";
    for (toml, rule, words) in [
        (plan, "{ pattern = 'b.*', shards = 1 }", ["line 6, column 22", "unknown field `shards`"]),
        (plan, "{ pattern = 'b.*', shard = 'x' }", ["line 6, column 30", "invalid type: string"]),
        (plan, "{ pattern = 'b.*' }", ["line 6, column 3", "pattern `b.*` needs either `shard`"]),
        (plan, "{ shard = 1 }", ["line 6, column 3", "missing field `pattern`"]),
        (plan, "{ pattern = 'b.*', replicate = true, padded = true }", ["line 6, column 3", "cannot be `padded`"]),
        (listed, "pattern = 'b.*'\nshards = 1", ["line 8, column 1", "unknown field `shards`"]),
        (listed, "pattern = 'b.*'", ["line 6, column 1", "pattern `b.*` needs either `shard`"]),
        (cut, "{ before = ['a.*', 3] }", ["line 4, column 26", "invalid type: integer `3`"]),
        (cut, "{ befor = ['a.*'] }", ["line 4, column 9", "unknown variant `befor`"]),
    ] {
        let toml = toml.replace("RULE", rule);
        let error = toml.parse::<Strategy>().expect_err(&toml);
        says(&error, &words);
        says(&error, &["; the forms are "]);
        assert_eq!(error.to_string().matches("the forms are").count(), 1, "{error}");
    }
    let json = "{\n\"tp\": 2,\n\"tensor\": {\"plan\": {\"parameters\": [\n{\"pattern\": \"a\", \"shards\": 1}]}}}";
    says(&of_json(json).unwrap_err(), &["line 4", "unknown field `shards`", "; the forms are "]);
    // Nor is one file told of the forms of another.
    says(&"tensor = { plan = { parameter = 1 } }".parse::<Strategy>().unwrap_err(), &["the forms are"]);
    assert!(!"replicas = 2".parse::<Strategy>().unwrap_err().to_string().contains("the forms are"));
}

/// Nor does it matter who reads: serde alone, or burn's `Config`.
#[test]
fn forms_are_told_by_serde_alone() {
    let by_config = |error: burn::config::ConfigError| error.to_string();
    let rules = r#"{"parameters": [{"pattern": "a", "shards": 1}]}"#;
    let json = format!("{{\n\"plan\": {rules}}}");
    let cut = "{\"micro_batches\": 2,\n\"cut\": {\"befor\": []}}";
    let strategy = format!("[tensor]\nplan = {}", rules.replace(": ", " = "));
    for (said, words) in [
        (serde_json::from_str::<TensorParallelConfig>(&json).unwrap_err().to_string(), ["line 2", "field `shards`"]),
        (by_config(TensorParallelConfig::load_binary(json.as_bytes()).unwrap_err()), ["line 2", "field `shards`"]),
        (by_config(PipelineConfig::load_binary(cut.as_bytes()).unwrap_err()), ["line 2", "variant `befor`"]),
        (toml::from_str::<Strategy>(&strategy).unwrap_err().to_string(), ["line 2", "field `shards`"]),
    ] {
        assert!(words.iter().all(|word| said.contains(word)), "{said}");
        assert_eq!(said.matches("; the forms are `").count(), 1, "{said}");
    }
}

#[test]
fn right_forms_are_taken() {
    for (name, dtype) in [
        ("BF16", FloatDType::BF16),
        ("bf16", FloatDType::BF16),
        ("F16", FloatDType::F16),
        ("f16", FloatDType::F16),
        ("f32", FloatDType::F32),
        ("F64", FloatDType::F64),
    ] {
        let strategy: Strategy = format!("data.reduce_dtype = '{name}'").parse().unwrap();
        assert_eq!(strategy.data.reduce_dtype, Some(dtype));
        // As it is written.
        let again: Strategy = strategy.to_string().parse().unwrap();
        assert_eq!(again.data.reduce_dtype, Some(dtype));
    }
    let schedules = [
        Schedule::GPipe,
        Schedule::OneForwardOneBackward,
        Schedule::ZeroBubbleH1,
        Schedule::Interleaved { stages_per_rank: 3 },
        Schedule::ForwardOnly { stages_per_rank: 1 },
        Schedule::Custom("0F0,0B0\n1F0,1B0".parse().unwrap()),
    ];
    let cuts = [
        Cut::Balanced,
        Cut::before(["a.*"]),
        Cut::patterns([["a.*"], ["*"]]),
        Cut::listed([("a", 0)]),
        Cut::Measured(vec![0.5, 2.0]),
    ];
    for (place, schedule) in schedules.into_iter().enumerate() {
        let config = PipelineConfig::new(4).with_schedule(schedule).with_cut(cuts[place % cuts.len()].clone());
        let strategy = Strategy::new().with_pp(2, config.clone());
        let again: Strategy = strategy.to_string().parse().unwrap();
        assert_eq!(again.pipeline, Some(config.clone()));
        let again = of_json(&serde_json::to_string(&strategy).unwrap()).unwrap();
        assert_eq!(again.pipeline, Some(config));
    }
}

/// Who writes a key wants something of it.
#[test]
fn keys_that_nothing_reads_are_refused() {
    let plan = "tensor.plan = 'megatron'\n";
    let pipeline = "pipeline.micro_batches = 2\n";
    for (toml, key, why) in [
        (plan.to_owned(), "tensor.plan", "`tp` is 1"),
        (format!("pp = 1\n{pipeline}"), "pipeline", "`pp` is 1"),
        ("tensor.seed = 3".into(), "tensor.seed", "`engine = \"captured\"`"),
        ("engine = 'eager'\ntensor.fusion = false".into(), "tensor.fusion", "eager"),
        (
            format!("pp = 2\ntensor.check_inputs_every = 3\n{pipeline}"),
            "tensor.check_inputs_every",
            "pipeline.check_inputs_every",
        ),
        (format!("pp = 2\ntp = 2\n{plan}tensor.fusion = false\n{pipeline}"), "tensor.fusion", "pipeline.fusion"),
        (format!("pp = 2\ntp = 2\n{plan}{pipeline}pipeline.seed = 7"), "pipeline.seed", "tensor.seed"),
    ] {
        let error = toml.parse::<Strategy>().expect_err(&toml);
        assert!(matches!(error, Error::Strategy { .. }), "{error}");
        says(&error, &[&format!("nothing reads `{key}`"), why]);
    }
    says(&of_json(r#"{"tensor": {"plan": "megatron"}}"#).unwrap_err(), &["tensor.plan", ".json"]);
    for toml in [
        "engine = 'captured'\ntensor.seed = 3".to_owned(),
        "data.sharding = 'parameters'\ntensor.seed = 3".into(),
        format!("tp = 2\n{plan}tensor.seed = 3\ntensor.fusion = false"),
        format!("pp = 2\n{pipeline}pipeline.seed = 7\npipeline.fusion = false"),
    ] {
        let strategy: Strategy = toml.parse().unwrap_or_else(|error| panic!("{toml}: {error}"));
        assert_eq!(strategy.to_string().parse::<Strategy>().unwrap().to_string(), strategy.to_string());
    }
    // In code a size may be 1 that is another number elsewhere; what is printed can be read.
    let config = TensorParallelConfig::new(Plan::megatron()).with_seed(3);
    let strategy = Strategy::new().with_tp(1, config).with_pp(1, PipelineConfig::new(4));
    assert_eq!(strategy.to_string().parse::<Strategy>().unwrap().to_string(), Strategy::new().to_string());
    let buckets = "data.bucket_bytes = 0".parse::<Strategy>().unwrap();
    let error = launch::threads(2).run(|rank| two().parallelize(&rank, &buckets).map(|_| ())).unwrap_err();
    says(&error, &["`bucket_bytes` is 0", "1 at least"]);
}

/// In code a size may be 1 beside a plan for others: a file leaves that out.
#[test]
fn what_is_saved_can_be_read() {
    let strategy = Strategy::new().with_dp(2).with_tp(1, Plan::megatron());
    for extension in ["json", "toml"] {
        let path = std::env::temp_dir().join(format!("saved-strategy-{}.{extension}", std::process::id()));
        strategy.save(&path).unwrap();
        let read = [Strategy::read(&path).unwrap(), Strategy::load(&path).unwrap()];
        std::fs::write(
            &path,
            if extension == "json" { "{\"tensor\": {\"plan\": \"megatron\"}}" } else { "tensor.plan = 'megatron'" },
        )
        .unwrap();
        let refused = Strategy::load(&path).unwrap_err();
        std::fs::remove_file(&path).unwrap();
        read.iter().for_each(|read| assert_eq!(read.to_string(), strategy.to_string()));
        assert!(refused.to_string().contains("nothing reads `tensor.plan`"), "{refused}");
        assert!(matches!(Strategy::load(&path), Err(ConfigError::FileNotFound(_))));
    }
    let refused = Strategy::load_binary(b"{\"pipeline\": {\"micro_batches\": 2}}").unwrap_err();
    assert!(refused.to_string().contains("nothing reads `pipeline`"), "{refused}");
}

/// The plan of docs/strategies.md.
#[test]
fn the_file_of_the_docs_is_read() {
    let docs = include_str!("../../docs/strategies.md");
    let file = docs.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let strategy: Strategy = file.parse().unwrap();
    assert_eq!(strategy.tp, 3);
    assert_ne!(strategy.tensor.plan, Plan::new());
}

#[test]
fn a_schedule_without_backward_does_not_train() {
    let custom = Schedule::Custom("0F0,0F1\n1F0,1F1".parse().unwrap());
    for schedule in [Schedule::ForwardOnly { stages_per_rank: 1 }, custom] {
        let config = PipelineConfig::new(2).with_schedule(schedule);
        // A strategy is for training.
        let strategy = Strategy::new().with_pp(2, config.clone());
        says(&strategy.axes(2).unwrap_err(), &["`pipeline.schedule`", "no backward pass", "`forward_with`"]);
        let refused = launch::threads(2).run(|rank| two().parallelize(&rank, &strategy).map(|_| ()));
        assert!(matches!(refused, Err(Error::Strategy { .. })), "{refused:?}");
        // By hand it evaluates, and is not optimized.
        launch::threads(2)
            .run(|rank| {
                let mut model = two().pipeline_parallel(&rank, config.clone())?;
                let step = model.step(rows(0), loss)?;
                assert!((step.loss.item() - loss(&two(), rows(0)).into_scalar::<f64>()).abs() < 1e-6);
                model.forward_with(rows(0), loss)?;
                let error = model.optimize(&mut sgd(), 0.1, step).unwrap_err();
                assert!(matches!(error, Error::Schedule { .. }));
                says(&error, &["no backward pass", "`1f1b`"]);
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn gradients_are_not_sent_in_a_dtype_that_cannot_travel() {
    let config = DataParallelConfig::new().with_reduce_dtype(FloatDType::Flex32);
    for ranks in [1, 2] {
        let error =
            launch::threads(ranks).run(|rank| two().data_parallel(&rank, config.clone()).map(|_| ())).unwrap_err();
        says(&error, &["Flex32", "BF16, F16, F32 or F64"]);
    }
    // A pipeline that is not cut yet says so too, when it is wrapped.
    let error = launch::threads(2)
        .run(|world| {
            let mesh = Mesh::new(&world, [("dp", 1), ("pp", 2)])?;
            let model = two().pipeline_parallel(&mesh.axis("pp")?, PipelineConfig::new(2))?;
            model.data_parallel(&mesh.axis("dp")?, config.clone()).map(|_| ())
        })
        .unwrap_err();
    says(&error, &["Flex32"]);
    let error = launch::threads(2)
        .run(|rank| {
            let config = DataParallelConfig::new().with_comm_hook(CastHook::new(FloatDType::Flex32));
            two().data_parallel(&rank, config)?.step(rows(0), loss).map(|_| ())
        })
        .unwrap_err();
    says(&error, &["CastHook cannot carry Flex32"]);
}

#[test]
fn a_sequence_is_along_one_of_the_first_two_dims() {
    let plan = |dim| Plan::new().shard("first.weight", 1).sequence_parallel(dim);
    for dim in [2, 7, 99] {
        let error = launch::threads(2).run(|rank| two().tensor_parallel(&rank, plan(dim)).map(|_| ())).unwrap_err();
        assert!(matches!(error, Error::Plan { .. }), "{error}");
        says(&error, &[&format!("`sequence_parallel({dim})`"), "`tp`", "dim 1"]);
        let other = Plan::new().on("dp", Plan::new().sequence_parallel(dim));
        says(&other.table_over(&two(), &[("tp", 2), ("dp", 2)]).unwrap_err(), &["axis `dp`"]);
    }
    for dim in [0, 1] {
        plan(dim).table(&two(), 2).unwrap();
    }
}

#[test]
fn far_more_stages_than_parameters_are_refused_at_once() {
    let began = Instant::now();
    for stages_per_rank in [33, 20_000] {
        let config = PipelineConfig::new(2).with_schedule(Schedule::Interleaved { stages_per_rank });
        let error =
            launch::threads(2).run(|rank| two().pipeline_parallel(&rank, config.clone()).map(|_| ())).unwrap_err();
        let stages = format!("{} stages over 2 ranks", 2 * stages_per_rank);
        says(&error, &[&stages, "4 parameters, for 64 stages", "fewer stages on each rank"]);
    }
    assert!(began.elapsed() < Duration::from_secs(10));
}

/// What is wrong with settings is one line, and names no rank when all have found it.
#[test]
fn errors_of_settings_come_without_a_log() {
    let wrong = Plan::new().shard("third.weight", 0);
    let error = launch::threads(4).run(|rank| two().tensor_parallel(&rank, wrong.clone()).map(|_| ())).unwrap_err();
    assert!(matches!(error, Error::Plan { .. }), "{error}");
    assert!(!error.to_string().contains("rank"), "{error}");
    // Of one rank alone.
    let error = launch::threads(3)
        .run(|rank| {
            rank.barrier()?;
            match rank.rank() {
                1 => two().tensor_parallel(&rank, wrong.clone()).map(|_| ()),
                _ => rank.barrier(),
            }
        })
        .unwrap_err();
    assert!(matches!(&error, Error::RankFailed { rank: 1, .. }), "{error}");
    let said = error.to_string();
    assert!(said.starts_with("plan: ") && said.ends_with("(rank 1 found it first)"), "{said}");
    assert!(!said.contains('\n') && !said.contains("barrier"), "{said}");
    // Errors of the user's own keep it.
    let error = launch::threads(3)
        .run(|rank| {
            rank.barrier()?;
            if rank.rank() == 2 { Err(Error::user("the disk is full")) } else { rank.barrier() }
        })
        .unwrap_err();
    says(&error, &["rank 2 failed: the disk is full", "barrier"]);
    // And so does what all of them have returned alike, without a rank.
    let error = launch::threads(3).run(|_| Err::<(), _>(Error::user("the loss is NaN"))).unwrap_err();
    assert_eq!(error, Error::user("the loss is NaN"));
}

#[test]
fn what_a_micro_batch_was_is_told_when_it_cannot_be_captured() {
    let pair = |model: &Two, (x, y): (Tensor<2>, Tensor<2>)| {
        let found = model.forward(x);
        (found - y).powi_scalar(2).mean()
    };
    let targets = || Numbers(3).tensor::<2>([4, 3], &device());
    let error = launch::threads(2)
        .run(|rank| {
            let config = PipelineConfig::new(2).with_whole_input("1");
            two().pipeline_parallel(&rank, config)?.step((rows(0), targets()), pair).map(|_| ())
        })
        .unwrap_err();
    assert!(matches!(error, Error::Graph { .. }), "{error}");
    says(&error, &["a micro-batch of 2 of 4 rows", "[\"1\"]", "must be divided"]);
}

/// Divided parameters are for those who lack memory, and captured steps keep what is promised: nobody has to ask for
/// them.
#[test]
fn steps_are_captured_where_parameters_are_divided() {
    let strategy = |sharding, engine| {
        let data = DataParallelConfig::new().with_sharding(sharding);
        Strategy::new().with_data(data).with_engine(engine)
    };
    for (ranks, sharding, engine, captured) in [
        (2, Sharding::Parameters, Engine::Auto, true),
        (2, Sharding::Parameters, Engine::Eager, false),
        (2, Sharding::Gradients, Engine::Auto, false),
        (1, Sharding::Parameters, Engine::Auto, false),
    ] {
        let strategy = strategy(sharding, engine);
        let wrapped = launch::threads(ranks)
            .run(|rank| Ok(own_by(&two(), &strategy).parallelize(&rank, &strategy)?.report().captured));
        assert_eq!(wrapped.unwrap()[0], captured, "{ranks} {sharding} {engine:?}");
    }
    // What cannot be captured says what else there is, unless it was asked for.
    let reads = |model: &Two, x: Tensor<2>| {
        let mean = loss(model, x);
        if mean.clone().into_scalar::<f32>() > 1.0 { mean.clone() * 0.5 } else { mean }
    };
    for (engine, advised) in [(Engine::Auto, true), (Engine::Captured, false)] {
        let strategy = strategy(Sharding::Parameters, engine);
        let error = launch::threads(2)
            .run(|rank| two().parallelize(&rank, &strategy)?.step(rows(0), reads).map(drop))
            .unwrap_err();
        says(&error, &["reads a tensor on the host"]);
        assert_eq!(error.to_string().contains("`engine` \"eager\" runs the model's own forward"), advised, "{error}");
    }
    let strategy = strategy(Sharding::Parameters, Engine::Eager);
    let eager = |rank: Rank| own_by(&two(), &strategy).parallelize(&rank, &strategy)?.step(rows(0), reads).map(drop);
    launch::threads(2).run(eager).unwrap();
}

/// A store that gives something else than it was asked for.
struct Lying;

impl SliceSource for Lying {
    fn dims(&mut self, path: &str) -> Result<Option<Vec<usize>>, Error> {
        Ok(Some(match path {
            "first.weight" => vec![6, 8],
            "first.bias" => vec![8],
            "second.weight" => vec![8, 3],
            _ => vec![3],
        }))
    }

    fn read(&mut self, _: &str, ranges: &[Range<usize>]) -> Result<TensorData, Error> {
        let mut dims: Vec<usize> = ranges.iter().map(Range::len).collect();
        dims[0] += 1;
        Ok(TensorData::zeros::<f32, _>(dims))
    }
}

#[test]
fn a_source_that_gives_other_dims_than_were_asked_for_is_found_out() {
    let error = launch::threads(2)
        .run(|rank| {
            let plan = Plan::new().shard("first.weight", 1);
            two().tensor_parallel(&rank, plan)?.load(&mut Lying).map(|_| ())
        })
        .unwrap_err();
    says(&error, &["load", "gave dims", "parameter `first.weight`"]);
}

/// Halves what it reduces, and forgets to cast it back.
#[derive(Debug)]
struct Narrowing;

impl CommHook for Narrowing {
    fn reduce(&self, bucket: Bucket, group: &Communicator) -> Result<Vec<Tensor<1>>, Error> {
        let narrow = bucket.gradients.into_iter().map(|gradient| gradient.cast(FloatDType::BF16)).collect();
        group.all_reduce_coalesced(narrow, ReduceOp::PreMulSum(bucket.factor))
    }
}

#[test]
fn a_hook_that_returns_another_dtype_is_found_out() {
    let error = launch::threads(2)
        .run(|rank| {
            let config = DataParallelConfig::new().with_comm_hook(Narrowing);
            two().data_parallel(&rank, config)?.step(rows(0), loss).map(|_| ())
        })
        .unwrap_err();
    says(&error, &["CommHook::reduce", "F32 came back as BF16"]);
}
