//! Plans out of any text, TOML or JSON, checked against a model.
#![no_main]

use burn::nn::{Linear, LinearConfig};
use burn::tensor::Device;
use burn_parallel::plan::Plan;

thread_local! {
    static MODEL: (Linear, Linear) = {
        let device = Device::flex();
        (LinearConfig::new(4, 6).init(&device), LinearConfig::new(6, 3).with_bias(false).init(&device))
    };
}

libfuzzer_sys::fuzz_target!(|input: (u8, &str)| {
    let (numbers, text) = input;
    let plan: Plan = match numbers & 1 {
        0 => match toml::from_str(text) {
            Ok(plan) => plan,
            Err(_) => return,
        },
        _ => match serde_json::from_str(text) {
            Ok(plan) => plan,
            Err(_) => return,
        },
    };
    let json = serde_json::to_string(&plan).expect("any plan can be written");
    assert_eq!(serde_json::from_str::<Plan>(&json).expect("what was written is a plan"), plan);
    // TOML has no numbers beyond those of 64 bits with a sign.
    if let Ok(written) = toml::to_string(&plan) {
        assert_eq!(toml::from_str::<Plan>(&written).expect("what was written is a plan"), plan);
    }
    let _ = plan.layout("0.weight");
    let (degree, other) = (usize::from(numbers >> 1 & 7), usize::from(numbers >> 4));
    MODEL.with(|model| {
        let _ = plan.table(model, degree).map(|table| table.to_string());
        let _ = plan.table_over(model, &[("tp", degree), ("dp", other)]).map(|table| table.to_string());
    });
});
