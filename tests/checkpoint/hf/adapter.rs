//! Adapters in the format of `peft`.

use std::fs;
use std::path::Path;

use burn::module::{Module, ModuleMapper, Param, ParamGroup};
use burn::prelude::*;
use burn_parallel::hf::{self, Adapter, AdapterConfig, Mapping, Rule, SaveConfig};
use burn_parallel::prelude::*;
use burn_parallel::sharding::Sharding;
use burn_parallel::train::Engine;

use crate::Dir;
use crate::common::checkpointing::own_by;
use crate::common::llama::Llama;
use crate::common::models::Numbers;
use crate::hf::golden::Name;
use crate::hf::{counting, file_of, save};

pub const NAME: Name = Name::Llama;
pub const SIZES: AdapterConfig = AdapterConfig { rank: 2, alpha: 4.0 };

/// The model with adapters, none of which is zero.
fn adapted(device: &Device) -> Llama {
    struct Fill(Numbers, Vec<String>);
    impl ModuleMapper for Fill {
        fn enter_module(&mut self, name: &str, _: &str) {
            self.1.push(name.into());
        }

        fn exit_module(&mut self, _: &str, _: &str) {
            self.1.pop();
        }

        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            match self.1.iter().any(|name| name == "lora") {
                true => param.map(|value| {
                    let (dims, device) = (value.dims(), value.device());
                    (self.0.tensor(dims, &device) * 0.3).require_grad()
                }),
                false => param,
            }
        }
    }
    bare(device).map(&mut Fill(Numbers(5), Vec::new()))
}

/// The model with adapters that do nothing yet.
pub fn bare(device: &Device) -> Llama {
    let group = ["q_proj", "v_proj", "down_proj"].into_iter().flat_map(|name| {
        let part = if name == "down_proj" { "mlp" } else { "self_attn" };
        (0..4).map(move |layer| format!("model.layers.{layer}.{part}.{name}.weight"))
    });
    let group = ParamGroup::from_paths(group.collect::<Vec<_>>());
    NAME.fresh(device).apply_lora(SIZES.lora().set_param_group(group))
}

fn plan() -> Plan {
    Plan::new()
        .shard("*.q_proj.weight", 1)
        .shard("*.k_proj.weight", 1)
        .shard("*.v_proj.weight", 1)
        .shard("*.o_proj.weight", 0)
}

pub fn strategy(axes: [usize; 3]) -> Strategy {
    match axes[2] {
        1 => NAME.strategy(axes),
        tp => NAME.strategy([axes[0], axes[1], 1]).with_tp(tp, plan()),
    }
}

pub fn base() -> Result<hf::Mapped, Error> {
    hf::open(NAME.folder())?.mapped(Mapping::llama())
}

pub fn near(found: f64, expected: f64) {
    assert!((found - expected).abs() < 2e-5 * expected, "{found}, not {expected}");
}

/// The loss of the model with its adapters, on one rank.
pub fn expected() -> f64 {
    let losses = launch::threads(1).run(|world| {
        let model = adapted(&world.device().autodiff()).data_parallel(&world, DataParallelConfig::new())?;
        NAME.golden().loss(&mut model.load(&mut base()?)?, (0, 1))
    });
    losses.unwrap()[0]
}

pub fn save_adapters(axes: [usize; 3], dir: &Path) {
    launch::threads(axes.iter().product())
        .run(|world| {
            let model = adapted(&world.device().autodiff()).parallelize(&world, &strategy(axes))?;
            let config = SaveConfig::new(Mapping::llama()).with_piece_bytes(100);
            hf::save_adapter(&model, &world, dir, ("base", SIZES), &config).map(drop)
        })
        .unwrap();
}

#[test]
fn adapters_go_from_mesh_to_mesh() {
    let expected = expected();
    assert!((expected - NAME.golden().losses[0]).abs() > 1e-3, "the adapters do nothing");
    for (from, to) in [([2, 1, 1], [1, 1, 2]), ([1, 1, 2], [1, 2, 1]), ([1, 2, 1], [2, 1, 1])] {
        let dir = Dir::fresh();
        save_adapters(from, &dir.join("adapter"));
        let names = hf::open(dir.join("adapter/adapter_model.safetensors")).unwrap();
        assert_eq!(names.names().count(), 2 * 12);
        let q = "base_model.model.model.layers.3.self_attn.q_proj";
        assert_eq!(names.tensor_dims(&format!("{q}.lora_A.weight")), Some(&[2, 64][..]));
        assert_eq!(names.tensor_dims(&format!("{q}.lora_B.weight")), Some(&[64, 2][..]));
        let said: serde_json::Value =
            serde_json::from_slice(&fs::read(dir.join("adapter/adapter_config.json")).unwrap()).unwrap();
        assert_eq!((&said["r"], &said["lora_alpha"], &said["peft_type"]), (&2.into(), &4.0.into(), &"LORA".into()));
        assert_eq!(said["target_modules"].as_array().unwrap().len(), 12);

        launch::threads(2)
            .run(|world| {
                let device = world.device().autodiff();
                let adapter = || Adapter::open(dir.join("adapter"));
                assert_eq!(adapter()?.config(), SIZES);
                let share = |model: &burn_parallel::train::Parallel<Llama>| {
                    Ok::<_, Error>((model.mesh().coordinate("dp")?, to[0]))
                };
                let model = bare(&device).parallelize(&world, &strategy(to))?.load(&mut base()?)?;
                let mut model = model.load(&mut adapter()?.mapped(&Mapping::llama())?)?;
                let at = share(&model)?;
                near(NAME.golden().loss(&mut model, at)?, expected);
                let plain = NAME.fresh(&device).parallelize(&world, &strategy(to))?;
                let mut plain = plain.load(&mut base()?.merged(adapter()?)?)?;
                near(NAME.golden().loss(&mut plain, at)?, expected);
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn adapters_are_merged_as_a_model_is_written() {
    let expected = expected();
    for axes in [[1, 1, 1], [1, 1, 2], [1, 2, 1]] {
        let dir = Dir::fresh();
        launch::threads(axes.iter().product())
            .run(|world| {
                let model =
                    adapted(&world.device().autodiff()).parallelize(&world, &strategy(axes))?.load(&mut base()?)?;
                let config = SaveConfig::new(Mapping::llama()).with_piece_bytes(700);
                let said = hf::save(&model, &world, dir.join("out"), &config).unwrap_err().to_string();
                assert!(
                    said.contains("the model has adapters, as `model.layers.0.self_attn.q_proj.weight.lora.a`"),
                    "{said}"
                );
                hf::save(&model, &world, dir.join("out"), &config.with_merged_adapters(SIZES.alpha)).map(drop)
            })
            .unwrap();
        launch::threads(1)
            .run(|world| {
                let model = NAME.fresh(&world.device().autodiff()).parallelize(&world, &Strategy::new())?;
                let mut model = model.load(&mut hf::open(dir.join("out"))?.mapped(Mapping::llama())?)?;
                near(NAME.golden().loss(&mut model, (0, 1))?, expected);
                Ok(())
            })
            .unwrap();
    }
}

/// Where the plan or the replicas divide the factors of adapters otherwise than the weights, ranks send each other what
/// they lack: what is written is what one rank writes, within rounding, and what a rank is sent is no more than that.
#[test]
fn adapters_are_merged_wherever_their_factors_are() {
    let dir = Dir::fresh();
    let merged = |strategy: &Strategy, ranks: usize, to: &str| {
        let saved = launch::threads(ranks).run(|world| {
            let model = own_by(&adapted(&world.device().autodiff()), strategy).parallelize(&world, strategy)?;
            let model = model.load(&mut base()?)?;
            let config = SaveConfig::new(Mapping::llama()).with_piece_bytes(700).with_merged_adapters(SIZES.alpha);
            hf::save(&model, &world, dir.join(to), &config)
        });
        saved.unwrap()
    };
    merged(&Strategy::new(), 1, "one");
    let divided = DataParallelConfig::new().with_sharding(Sharding::Parameters);
    let rows = |axes, engine| strategy(axes).with_data(divided.clone()).with_engine(engine);
    // Factors split across the plan's dims of their weights, and in an odd number of parts.
    let across = plan().shard("*.q_proj.weight.lora.a", 0).shard("*.q_proj.weight.lora.b", 0).shard("*.lora.b", 1);
    for (number, (strategy, ranks, travels)) in [
        (rows([2, 1, 1], Engine::Captured), 2, true),
        (rows([2, 1, 1], Engine::Eager), 2, true),
        (rows([2, 1, 2], Engine::Captured), 4, true),
        (rows([3, 2, 1], Engine::Captured), 6, true),
        (Strategy::new().with_tp(2, across), 2, true),
        (strategy([2, 1, 1]), 2, false),
    ]
    .into_iter()
    .enumerate()
    {
        let to = format!("out{number}");
        for saved in merged(&strategy, ranks, &to) {
            // A piece, the messages of two more, and of 12 adapters of at most 352 values.
            assert!(saved.largest_buffer <= 3 * 700 + if travels { 12 * 352 * 4 } else { 0 }, "{number}: {saved:?}");
        }
        save::near(&dir.join("one"), &dir.join(&to), 1e-6);
    }
}

#[test]
fn adapters_that_burn_has_none_of() {
    let dir = Dir::fresh();
    let says = |config: &str, words: &str| {
        fs::write(dir.join("adapter_config.json"), config).unwrap();
        let said = Adapter::open(dir.path()).unwrap_err().to_string();
        assert!(said.contains(words), "`{words}` is missing in: {said}");
    };
    let with = |more: &str| format!(r#"{{"peft_type":"LORA","r":2,"lora_alpha":4{more}}}"#);
    says(r#"{"peft_type":"IA3"}"#, "only LORA is known");
    says(r#"{"peft_type":"LORA","r":2}"#, "`lora_alpha` is missing");
    says(r#"{"peft_type":"LORA","r":0,"lora_alpha":1}"#, "`r` is 0");
    says(&with(r#","use_dora":true"#), "`use_dora` is true");
    says(&with(r#","rank_pattern":{"q_proj":4}"#), "`rank_pattern` is");
    says(&with(r#","modules_to_save":["lm_head"]"#), "`modules_to_save` is");
    says(&with(r#","bias":"all""#), "`bias` is");
    says(&with(""), "neither `adapter_model.safetensors`");
    fs::write(dir.join("adapter_model.safetensors"), file_of(&counting(&[("x.lora_embedding_A", &[2])]))).unwrap();
    says(&with(""), "tensor `x.lora_embedding_A` is no part of a LoRA adapter");

    let name = "base_model.model.h.0.attn.c_attn.lora_A.weight";
    fs::write(dir.join("adapter_model.safetensors"), file_of(&counting(&[(name, &[2, 4])]))).unwrap();
    fs::write(dir.join("adapter_config.json"), with(r#","use_rslora":true"#)).unwrap();
    let adapter = || Adapter::open(dir.path()).unwrap();
    assert_eq!(adapter().config().alpha, 4.0 * 2f64.sqrt());
    let said = adapter().mapped(&Mapping::gpt2()).unwrap_err().to_string();
    assert!(said.contains("an adapter of `h.0.attn.c_attn.weight`, which the mapping cuts"), "{said}");
    let said = adapter().mapped(&Mapping::new().rule(Rule::new("a", "b"))).unwrap_err().to_string();
    assert!(said.contains("which no rule of the mapping fits"), "{said}");
    let said = base().unwrap().merged(adapter()).unwrap_err().to_string();
    assert!(said.contains("has an adapter of `h.0.attn.c_attn.weight`, and the base no such tensor"), "{said}");
}

#[test]
fn a_model_without_adapters_has_none_to_write() {
    let dir = Dir::fresh();
    let error = launch::threads(1).run(|world| {
        let model = NAME.fresh(&world.device().autodiff()).data_parallel(&world, DataParallelConfig::new())?;
        hf::save_adapter(&model, &world, dir.join("x"), ("", SIZES), &SaveConfig::new(Mapping::llama())).map(drop)
    });
    let said = error.unwrap_err().to_string();
    assert!(said.contains("`apply_lora` gives it some"), "{said}");
}

/// One rank passes a mapping that has no place for adapters: all say so at once, and the world goes on.
#[test]
fn a_mapping_that_one_rank_alone_cannot_follow() {
    let dir = Dir::fresh();
    let ran = launch::threads(2).timeout(std::time::Duration::from_secs(20)).run(|world| {
        let model = adapted(&world.device().autodiff()).data_parallel(&world, DataParallelConfig::new())?;
        let mapping = if world.rank() == 1 { Mapping::new() } else { Mapping::llama() };
        let save = hf::save_adapter(&model, &world, dir.join("a"), ("base", SIZES), &SaveConfig::new(mapping));
        let error = save.unwrap_err().to_string();
        world.barrier()?;
        Ok(error)
    });
    let errors = ran.unwrap();
    assert_eq!(errors[0], errors[1]);
    assert!(errors[0].contains("rank 1: ") && errors[0].contains("has no place"), "{}", errors[0]);
}
