//! Timetables out of any text: read, printed, proved, completed, simulated.
#![no_main]

use burn_parallel::pipeline_parallel::schedule::{Costs, Routes, Timetable};

libfuzzer_sys::fuzz_target!(|text: &str| {
    let Ok(timetable) = text.parse::<Timetable>() else { return };
    let again: Timetable = timetable.to_string().parse().expect("what was printed is a timetable");
    assert_eq!(again, timetable);
    let routes = Routes::chain(timetable.stages());
    let valid = timetable.validate(&routes);
    let _ = timetable.simulate(&routes, &Costs::default());
    if !timetable.communicates()
        && let Ok(full) = timetable.with_communication(&routes)
    {
        assert_eq!(full.computing(), timetable);
        assert_eq!(full.validate(&routes).is_ok(), valid.is_ok());
    }
});
