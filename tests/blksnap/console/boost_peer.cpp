// SPDX-License-Identifier: Apache-2.0
// Answers command lines as Boost.Program_options does; boost.json was made with it (Boost 1.74).
// Standard input has a line per case: the options ("device,d:one ranges,r:multi json,j:flag"), a tab, and the words
// separated by \x1f; \x1e is an empty word. Standard output has a line of JSON per case.
// g++ -o boost_peer boost_peer.cpp -lboost_program_options
#include <boost/program_options.hpp>
#include <iostream>
#include <sstream>

namespace po = boost::program_options;
using Strings = std::vector<std::string>;

static std::string quoted(const std::string& text) {
    std::string out = "\"";
    for (char c : text) out += (c == '"' || c == '\\') ? std::string("\\") + c : std::string(1, c);
    return out + "\"";
}

static std::string joined(const Strings& texts) {
    std::string out;
    for (const auto& text : texts) out += (out.empty() ? "" : ",") + quoted(text);
    return "[" + out + "]";
}

static Strings split(const std::string& text, char separator) {
    Strings words;
    std::istringstream stream(text);
    for (std::string word; std::getline(stream, word, separator);) words.push_back(word == "\x1e" ? "" : word);
    return words;
}

static std::string answer(const Strings& specs, const Strings& words) {
    po::options_description options;
    for (const auto& spec : specs) {
        auto name = spec.substr(0, spec.find(':')), kind = spec.substr(spec.find(':') + 1);
        if (kind == "flag") options.add_options()(name.c_str(), "");
        if (kind == "one") options.add_options()(name.c_str(), po::value<std::string>(), "");
        if (kind == "multi") options.add_options()(name.c_str(), po::value<Strings>()->multitoken(), "");
    }
    po::variables_map map;
    po::store(po::command_line_parser(words).options(options).run(), map);
    std::string out;
    for (const auto& [name, value] : map) {
        auto* one = boost::any_cast<std::string>(&value.value());
        auto texts = one ? Strings{*one} : value.as<Strings>();
        out += (out.empty() ? "" : ",") + quoted(name) + ":" + joined(texts);
    }
    return "{" + out + "}";
}

int main() {
    for (std::string line; std::getline(std::cin, line);) {
        auto tab = line.find('\t');
        try {
            std::cout << answer(split(line.substr(0, tab), ' '), split(line.substr(tab + 1), '\x1f')) << "\n";
        } catch (const std::exception& error) {
            std::cout << "{\"error\":" << quoted(error.what()) << "}\n";
        }
    }
}
