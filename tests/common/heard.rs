//! What the library says through the `log` crate.

use std::sync::Mutex;

use log::{LevelFilter, Log, Metadata, Record};

/// A logger that keeps lines.
#[derive(Default)]
pub struct Heard(Mutex<Vec<String>>);

impl Heard {
    /// Takes the place of the process's logger, which a test can do once a process.
    pub fn install(level: LevelFilter) -> &'static Self {
        let heard: &'static Self = Box::leak(Box::default());
        log::set_logger(heard).unwrap();
        log::set_max_level(level);
        heard
    }

    /// The lines since the last call, each with its level.
    pub fn take(&self) -> Vec<String> {
        self.0.lock().unwrap().drain(..).collect()
    }
}

impl Log for Heard {
    fn enabled(&self, _: &Metadata) -> bool {
        true
    }

    fn log(&self, record: &Record) {
        self.0.lock().unwrap().push(format!("{} {}", record.level(), record.args()));
    }

    fn flush(&self) {}
}
