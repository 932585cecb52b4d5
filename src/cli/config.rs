//! `planish config`: what the service would run with.

use clap::{Args, Subcommand};

use super::error::{CliError, Result};
use super::output::{self, Output};
use crate::config::{Flag, Loaded, load};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print the configuration in force as a file, with the source of every value
    Print(ConfigArgs),
}

/// Settings from the command line; they win over variables and the file.
#[derive(Debug, Args)]
pub struct ConfigArgs {
    /// Configuration file, TOML [env: PLANISH_CONFIG]
    #[arg(long, value_name = "FILE")]
    config: Option<std::path::PathBuf>,
    /// Address to listen on; port 0 takes a free one
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<String>,
    /// Folder of the database and the objects
    #[arg(long, value_name = "FOLDER")]
    data: Option<String>,
    /// Any setting by its key, for instance limits.running_jobs=2; may be repeated
    #[arg(long, value_name = "KEY=VALUE", value_parser = key_value)]
    set: Vec<(String, String)>,
}

fn key_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("write it as key=value")?;
    Ok((key.trim().to_owned(), value.to_owned()))
}

impl ConfigArgs {
    /// The configuration in force: defaults, file, variables, flags.
    pub fn load(&self) -> Result<Loaded> {
        let flag = |flag: &str, key: &str, value: &str| Flag {
            flag: flag.to_owned(),
            key: key.to_owned(),
            value: value.to_owned(),
        };
        let mut flags: Vec<Flag> =
            self.set.iter().map(|(key, value)| flag("--set", key, value)).collect();
        flags.extend(self.listen.iter().map(|v| flag("--listen", "server.listen", v)));
        flags.extend(self.data.iter().map(|v| flag("--data", "data.folder", v)));
        Ok(load(self.config.as_deref(), &flags)?)
    }
}

impl Command {
    pub fn run(self, output: Output) -> Result<()> {
        let Self::Print(args) = self;
        let loaded = args.load()?;
        if output.is_json() {
            return output::json(&loaded.config);
        }
        let text = loaded.to_toml().map_err(CliError::from)?;
        output::text(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_pairs() {
        assert_eq!(key_value("a.b=c=d").unwrap(), ("a.b".to_owned(), "c=d".to_owned()));
        assert!(key_value("a.b").is_err());
    }
}
